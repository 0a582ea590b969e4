"""What pyproject.toml cannot say: configs/ and released/ are installed below ham_jax/."""

from pathlib import Path

from setuptools import find_packages, setup

BESIDE = [name for name in ("configs", "released") if Path(name).is_dir()]

setup(
    packages=find_packages(include=["ham_jax*"]) + [f"ham_jax.{name}" for name in BESIDE],
    package_dir={f"ham_jax.{name}": name for name in BESIDE},
)
