"""What is remembered of a picture, again under Model Runner V2.

But for a client's name for two pictures, with which stock vLLM itself answers wrongly there.
"""

from __future__ import annotations

import pytest

from tests.engine.test_remembered_pictures import (
    engine,
    test_other_weights_put_pictures_in_another_order,
)

__all__ = ["engine", "test_other_weights_put_pictures_in_another_order"]

pytestmark = pytest.mark.long
