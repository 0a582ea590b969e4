"""What pyproject.toml cannot say: configs/ is installed as ham_jax/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ham_jax*"]), "ham_jax.configs"],
    package_dir={"ham_jax.configs": "configs"},
)
