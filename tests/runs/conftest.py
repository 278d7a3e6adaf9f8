"""Runs that several files look at."""

import pytest
from stages import TOY, call, three_stages


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder after all three stages on the toy environment: source, adapted, policy"""
    import draw_pretrain
    import redraw_adapt
    import train_policy

    modules = {m.__name__: m for m in (draw_pretrain, redraw_adapt, train_policy)}
    folder = tmp_path_factory.mktemp("toy")
    three_stages(lambda script, *flags: call(modules[script], *flags), folder, *TOY)
    return folder
