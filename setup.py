"""Builds the one extension, dora._C, from csrc/. Needs a C++17 compiler and OpenSSL's headers."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.modified import newer_group

HEADERS = sorted(glob("csrc/*.h"))

# Files compile side by side (environment variable MAX_JOBS limits how many), and only those that
# changed.
ParallelCompile(
    "MAX_JOBS", needs_recompile=lambda made, source: newer_group([source, *HEADERS, __file__], made)
).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "dora._C",
            sorted(glob("csrc/*.cpp")),
            include_dirs=["csrc"],
            depends=HEADERS,
            libraries=["crypto"],
            cxx_std=17,
            # Without contraction: how often a result is rounded must not depend on the processor.
            extra_compile_args=["-O3", "-g0", "-Wall", "-Wextra", "-pthread", "-ffp-contract=off"],
            extra_link_args=["-pthread"],
        )
    ]
)
