"""Builds block.pyx against the forge_c that this Python imports.

    python setup.py build_ext --inplace && python run.py
"""
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

import forge_c

folder = forge_c.get_library_dir()
block = Extension("block", ["block.pyx"], include_dirs=[forge_c.get_include()], libraries=["forge_c"],
                  library_dirs=[folder], runtime_library_dirs=[folder])
# cimport looks for forge_c/_c.pxd where Python finds forge_c.
setup(name="block", ext_modules=cythonize(block, include_path=[str(Path(forge_c.__file__).parents[1])]))
