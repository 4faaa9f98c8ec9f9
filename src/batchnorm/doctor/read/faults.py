"""What is wrong with a container, by the code of the rule that reports it."""

from typing import Any

# a file of nothing but faults should not fill the memory with them
MOST = 100
# characters of a name
LONGEST = 256


class Faults(dict[str, list[dict[str, Any]]]):
    """Code of the rule to its faults: ``where`` (member, tensor or ""), ``problem``, ``grave``, and numbers by name."""

    def add(self, code: str, where: str, problem: str, *, grave: bool = True, **measured: Any) -> None:
        """Note a fault; of more than :data:`MOST` the last one counts the rest as ``more``."""
        known = self.setdefault(code, [])
        if len(known) < MOST:
            known.append({"where": where[:LONGEST], "problem": problem, "grave": grave, **measured})
        else:
            known[-1]["more"] = known[-1].get("more", 0) + 1
