import dataclasses

import pytest
from tiny_run import make_run

from gcompute.train.programs import compiler_options

pytestmark = pytest.mark.oldest


def test_only_the_tpu_compiler_is_told_to_gather_first_and_only_when_asked():
    default = make_run()
    gathering = dataclasses.replace(default, train=dataclasses.replace(default.train, collective_matmul=False))
    (option,) = compiler_options(gathering, "tpu")
    assert "windowed_einsum" in option
    assert compiler_options(default, "tpu") == compiler_options(gathering, "cpu") == {}
