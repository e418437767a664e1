"""pytest tests/unit/test_resources.py"""

import pytest

from selectmoe.errors import UserError
from selectmoe.resources import ACCELERATORS, AcceleratorConfig, parse_memory


@pytest.mark.parametrize(
    "name", [*ACCELERATORS, "nvidia.com/mig-1g.5gb", "nvidia.com/mig-7g.80gb", "nvidia.com/mig-1g.5gb.me"]
)
def test_known_accelerators(name):
    AcceleratorConfig(name, 1, "16Gi").validate()


def test_nothing_is_asked_for_by_default():
    AcceleratorConfig().validate()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("nvidia.com/mig-1g", 1, ""), "nvidia.com/mig-1g "),
        (("gpu", 1, ""), "nvidia.com/gpu"),
        (("", 1, ""), "needs accelerator.type"),
        (("nvidia.com/gpu", -1, ""), "must not be negative"),
        (("", 0, "sixteen"), "16Gi"),
    ],
)
def test_what_is_wrong_is_named(given, named):
    with pytest.raises(UserError, match="accelerator") as error:
        AcceleratorConfig(*given).validate()
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("text", "size"), [("16Gi", 16 << 30), ("500M", 500_000_000), ("1Ti", 1 << 40), ("2000000000", 2e9)]
)
def test_quantities(text, size):
    assert parse_memory(text, "memory") == size


@pytest.mark.parametrize("text", ["16GB", "1.5Gi", "-1Gi", "16 Gi", "16gi", "16Ki", "0", "64k", "1e9"])
def test_what_is_no_quantity_or_too_small(text):
    with pytest.raises(UserError, match="memory="):
        parse_memory(text, "memory")


@pytest.mark.parametrize("text", ["64Mi", "16Gi", "3T", "100000000"])
def test_kfp_takes_what_is_accepted(text):
    """The pipeline hands the quantity on as it stands."""
    from kfp import dsl

    @dsl.component
    def nothing():
        pass

    @dsl.pipeline
    def one():
        nothing().set_memory_limit(text)

    parse_memory(text, "memory")
    assert one.pipeline_spec
