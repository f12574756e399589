import pytest
from texts import prepare_text


@pytest.fixture(scope="session")
def real_text(tmp_path_factory):
    prefix = prepare_text(tmp_path_factory.mktemp("data"), (1, 3, 40, 700, 3000), held_out=0)
    return prefix.with_name("python_train")
