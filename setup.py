"""Builds the one optional extension: csrc/index.cpp, the sample order and batch gather (pybind11, no torch).

Without a compiler or pybind11 the install still succeeds: engine.data.order then runs its numpy reference, the one
the tests use as oracle, and says so in one line.
"""

import sys

from setuptools import setup

try:
    from pybind11.setup_helpers import Pybind11Extension, build_ext
except ImportError:
    print("warning: pybind11 is not installed, engine._index is not built (numpy takes over)", file=sys.stderr)
    setup()
else:
    index = Pybind11Extension("engine._index", ["csrc/index.cpp"], cxx_std=17, extra_compile_args=["-O3"])
    index.optional = True
    setup(ext_modules=[index], cmdclass={"build_ext": build_ext})
