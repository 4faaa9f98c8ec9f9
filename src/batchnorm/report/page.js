"use strict";
// One vertical line through every panel, and the values of all curves where it stands.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const panels = JSON.parse(document.getElementById("figure-data").textContent);

  const element = (name, attributes, parent) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    parent.append(node);
    return node;
  };

  for (const panel of panels) {
    const [left, top, , bottom] = panel.box;
    panel.root = document.getElementById(panel.id);
    panel.svg = panel.root.querySelector(".plot svg");
    panel.cells = [...panel.root.querySelectorAll(".readout dd")];
    panel.overlay = element("g", { visibility: "hidden", class: "cursor" }, panel.svg);
    panel.line = element("line", { x1: left, x2: left, y1: top, y2: bottom, stroke: "#59636e" }, panel.overlay);
    panel.dots = panel.curves.map(({ color }) =>
      element("circle", { r: 2.6, fill: color, stroke: "#fff", "stroke-width": 0.8 }, panel.overlay));
  }

  const write = (panel, i) => {
    panel.cells[0].textContent = panel.labels[i];
    panel.curves.forEach((curve, k) => { panel.cells[k + 1].textContent = curve.text[i]; });
  };

  const show = (panel, i) => {
    write(panel, i);
    panel.index = i;
    const x = panel.x[i];
    panel.line.setAttribute("x1", x);
    panel.line.setAttribute("x2", x);
    panel.dots.forEach((dot, k) => {
      const y = panel.curves[k].y[i];
      dot.setAttribute("cx", x);
      dot.setAttribute("cy", y ?? 0);
      dot.setAttribute("visibility", y === null ? "hidden" : "inherit");
    });
    panel.overlay.setAttribute("visibility", "visible");
  };

  const hide = (panel) => {
    write(panel, panel.labels.length - 1);
    panel.index = undefined;
    panel.overlay.setAttribute("visibility", "hidden");
  };

  const showAll = (source, i) => {
    for (const panel of panels) {
      const same = panel === source ? i : panel.labels.indexOf(source.labels[i]);
      if (same < 0) hide(panel);
      else show(panel, same);
    }
  };

  const hideAll = () => panels.forEach(hide);

  const nearest = (panel, clientX) => {
    const area = panel.svg.getBoundingClientRect();
    const x = ((clientX - area.left) / area.width) * panel.svg.viewBox.baseVal.width;
    let best = 0;
    panel.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(panel.x[best] - x)) best = i; });
    return best;
  };

  const MOVES = { ArrowLeft: (i) => i - 1, ArrowRight: (i) => i + 1, Home: () => 0, End: (i, last) => last };

  for (const panel of panels) {
    const plot = panel.root.querySelector(".plot");
    for (const event of ["pointerdown", "pointermove"]) {
      plot.addEventListener(event, ({ clientX }) => showAll(panel, nearest(panel, clientX)));
    }
    plot.addEventListener("pointerleave", hideAll);
    panel.root.tabIndex = 0;
    panel.root.setAttribute("role", "group");
    panel.root.setAttribute("aria-label", "Panel: arrow keys read its values");
    panel.root.querySelector(".readout").setAttribute("aria-live", "polite");
    panel.root.addEventListener("blur", hideAll);
    panel.root.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hideAll();
      if (!Object.hasOwn(MOVES, event.key)) return;
      const last = panel.labels.length - 1;
      const next = MOVES[event.key](panel.index ?? last, last);
      showAll(panel, Math.min(Math.max(next, 0), last));
      event.preventDefault();
    });
  }

  // what is folded away on the screen belongs on paper
  addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details")) details.open = true; });
  document.documentElement.classList.add("scripted");
})();
