"""What pyproject.toml cannot say: recipes/, at the top of the checkout, is installed as trainer/recipes/."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["trainer", "trainer.*"]), "trainer.recipes"],
    package_dir={"trainer.recipes": "recipes"},
    package_data={
        "trainer": ["py.typed", "reporting/templates/*", "exporting/templates/*"],
        "trainer.recipes": ["*.yaml", "records/*.yaml"],
    },
    include_package_data=False,
)
