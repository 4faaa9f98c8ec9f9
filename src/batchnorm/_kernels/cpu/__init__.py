"""Numba kernels for the CPU.

``geometry.py`` cuts a tensor into tasks, ``forward.py`` and ``backward.py`` hold what is done with one task,
``driver.py`` the order of the tasks. ``launch.py`` compiles kernels and runs them, on the threads of ``team.py``.
"""
