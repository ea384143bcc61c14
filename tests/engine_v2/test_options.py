"""What operators turn on beside the extension, again under Model Runner V2."""

from __future__ import annotations

import pytest

from tests.engine.test_connector import (
    test_blocks_for_others_are_not_promised,
    test_untouched_requests_load_what_an_empty_cache_lacks,
)
from tests.engine.test_lora import (
    test_a_batch_of_two_adapters_and_none,
    test_an_adapter_has_a_prefix_cache_of_its_own,
)

__all__ = [
    "test_a_batch_of_two_adapters_and_none",
    "test_an_adapter_has_a_prefix_cache_of_its_own",
    "test_blocks_for_others_are_not_promised",
    "test_untouched_requests_load_what_an_empty_cache_lacks",
]

pytestmark = pytest.mark.long
