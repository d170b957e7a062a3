"""Builds the compiled backend: every kernel module once per instruction set.

What is compiled here is optional. Where there is no C compiler the package installs without it and
runs on NumPy; `cpunorm.show_config()` says so.
"""

import copy
import glob
import os
import platform
import shutil
from hashlib import blake2b
from pathlib import Path

import Cython
import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

PACKAGE = "cpunorm.backends.cython"

# The kernels are built once per level and type; backends/cython/__init__.py picks the best level
# the CPU has.
TYPES = ("float32", "float64", "float16", "bfloat16")
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS = {f"x86_64_v{n}": ([f"-march=x86-64-v{n}"], TYPES) for n in (2, 3, 4)}
    LEVELS["x86_64_v4_bf16"] = ["-march=x86-64-v4", "-mavx512bf16"], ("bfloat16",)
else:
    LEVELS = {"baseline": ([], TYPES)}

# Everything to the letter but for the sweeps, whose own licence stands in sweeps.h.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
GCC_V4_FLAGS = ["-mprefer-vector-width=512"]
OPENMP = ["-fopenmp"]


def fingerprint():
    """Of all that the extensions are made from; times of files tell little, as pip's tools are
    installed anew each time."""
    sources = (f for kind in ("pyx", "pxd", "h") for f in Path("cpunorm").rglob(f"*.{kind}"))
    digest = blake2b(digest_size=8)
    for source in sorted((*sources, Path("setup.py"))):
        digest.update(source.read_bytes())
    tools = Cython.__version__, numpy.__version__, *map(os.environ.get, ("CC", "CFLAGS", "LDFLAGS"))
    digest.update(repr(tools).encode())
    return digest.hexdigest()


class BuildKernels(build_ext):
    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()
        if self.editable_mode:
            # A second editable install, with an extra say, finds here what the first has compiled.
            self.build_lib = f"build/editable-{fingerprint()}"
            for other in set(glob.glob("build/editable-*")) - {self.build_lib}:
                shutil.rmtree(other)

    def build_extension(self, ext):
        if self.editable_mode and os.path.exists(self.get_ext_fullpath(ext.name)):
            return
        # All levels of a module share one C file: keep their object files apart.
        scoped = copy.copy(self)
        scoped.build_temp = os.path.join(self.build_temp, ext.name)
        try:
            build_ext.build_extension(scoped, ext)
        except CCompilerError:
            # A compiler without OpenMP still makes a good serial backend.
            ext.extra_compile_args = [f for f in ext.extra_compile_args if f not in OPENMP]
            ext.extra_link_args = []
            build_ext.build_extension(scoped, ext)

    def copy_extensions_to_source(self):
        # For an editable install; setuptools expects the folders of the levels to be there.
        for ext in self.extensions:
            os.makedirs(os.path.join(*ext.name.split(".")[:-1]), exist_ok=True)
        super().copy_extensions_to_source()


def extension(name, source, macros=(), flags=()):
    return Extension(
        name,
        [source],
        depends=["cpunorm/backends/cython/sweeps.h", "cpunorm/backends/cython/vectors.h"],
        include_dirs=[numpy.get_include(), "cpunorm/backends/cython"],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
            ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"),
            *macros,
        ],
        extra_compile_args=[*FLAGS, *flags, *OPENMP],
        extra_link_args=OPENMP,
        optional=True,
    )


def extensions():
    names = [f"cpunorm.{name}" for name in ("_memory", "_openmp", "_runs", "_front", "_capi")]
    names += ["cpunorm.torch._tensors"]
    names += [f"{PACKAGE}.{name}" for name in ("verbs", "kernels")]
    *common, kernels = cythonize(
        [Extension(name, [name.replace(".", "/") + ".pyx"]) for name in names],
        language_level=3,
        force=True,  # Cython does not see that kernels.pyx depends on what its .pxd files include
        compiler_directives={"boundscheck": False, "wraparound": False, "cdivision": True},
    )
    for module in common:
        yield extension(module.name, module.sources[0])
    for level, (march, types) in LEVELS.items():
        flags = march + (GCC_V4_FLAGS if "v4" in level else [])
        for element in types:
            macros = [(f"ELEMENT_{element.upper()}", None)]
            name = f"{PACKAGE}.{level}.{element}.kernels"
            yield extension(name, kernels.sources[0], macros, flags)


setup(ext_modules=list(extensions()), cmdclass={"build_ext": BuildKernels})
