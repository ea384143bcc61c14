"""The engine suite's tests again, under Model Runner V2 and over the cases marked ``quick``."""

from __future__ import annotations

from tests.engine.test_attention_log import (
    open_logging,
    test_a_cached_prefix_is_read_like_any_other,
    test_a_preempted_request_logs_each_token_once,
    test_the_log_is_the_oracles_attention,
)
from tests.engine.test_bad_requests import test_bad_value_is_refused
from tests.engine.test_compiled import test_only_steps_in_which_rows_leave_are_eager
from tests.engine.test_connector import (
    test_blocks_are_taken_when_what_they_held_is_stored,
)
from tests.engine.test_encoder_cache import (
    test_a_prefix_that_covered_the_picture_is_lost,
    test_a_request_preempted_in_the_step_that_encodes_its_picture,
)
from tests.engine.test_exactness import (
    test_alone_is_exact,
    test_batch_is_exact,
    test_requests_join_a_running_batch,
    test_stock_baseline_is_the_oracle,
)
from tests.engine.test_inert import test_without_policy_equals_stock
from tests.engine.test_late_eviction import test_what_leaves_after_the_prefill_is_exact
from tests.engine.test_lifecycle import (
    test_abort_during_decode,
    test_abort_during_prefill,
    test_preempted_requests_stay_exact,
)
from tests.engine.test_merging import (
    test_pictures_are_shared_and_left_as_they_are,
    test_what_stays_takes_in_what_goes,
)
from tests.engine.test_parallel import test_two_workers_are_exact
from tests.engine.test_pipeline import (
    test_any_stages_are_exact,
    test_rows_leave_in_the_pieces_of_any_stage,
    test_rows_of_several_adapters_leave_on_any_stage,
    test_stages_that_are_compiled_are_exact,
    test_two_stages_are_exact,
    test_without_a_policy_stages_are_stock_vllms,
)
from tests.engine.test_policies import (
    test_ranks_by_many_rows_are_exact,
    test_ranks_by_place_are_exact,
    test_ranks_of_the_device_are_exact,
)
from tests.engine.test_prefix_caching import test_baseline_beside_policies
from tests.engine.test_prompt_logprobs import (
    test_entries_are_the_oracles_or_none,
    test_scores_of_chosen_tokens_are_no_numbers_where_a_token_left,
)
from tests.engine.test_received_attention import (
    test_who_asks_for_what_patches_receive_has_pictures_encoded_for_it,
)
from tests.engine.test_runner import test_model_runner
from tests.engine.test_share_ranks import (
    test_crops_by_what_patches_receive_are_exact,
    test_what_is_shared_out_is_exact,
)
from tests.engine.test_storage import test_blocks_hold_what_the_layers_see
from tests.engine.test_stress import test_random_traffic_is_exact
from tests.engine.test_tower_ranks import test_a_picture_that_another_request_had_encoded_is_ranked

__all__ = [
    "open_logging",
    "test_a_cached_prefix_is_read_like_any_other",
    "test_a_picture_that_another_request_had_encoded_is_ranked",
    "test_a_prefix_that_covered_the_picture_is_lost",
    "test_a_preempted_request_logs_each_token_once",
    "test_a_request_preempted_in_the_step_that_encodes_its_picture",
    "test_the_log_is_the_oracles_attention",
    "test_abort_during_decode",
    "test_abort_during_prefill",
    "test_alone_is_exact",
    "test_any_stages_are_exact",
    "test_bad_value_is_refused",
    "test_baseline_beside_policies",
    "test_batch_is_exact",
    "test_crops_by_what_patches_receive_are_exact",
    "test_entries_are_the_oracles_or_none",
    "test_blocks_are_taken_when_what_they_held_is_stored",
    "test_blocks_hold_what_the_layers_see",
    "test_model_runner",
    "test_only_steps_in_which_rows_leave_are_eager",
    "test_pictures_are_shared_and_left_as_they_are",
    "test_preempted_requests_stay_exact",
    "test_random_traffic_is_exact",
    "test_ranks_by_many_rows_are_exact",
    "test_ranks_by_place_are_exact",
    "test_ranks_of_the_device_are_exact",
    "test_requests_join_a_running_batch",
    "test_rows_leave_in_the_pieces_of_any_stage",
    "test_rows_of_several_adapters_leave_on_any_stage",
    "test_scores_of_chosen_tokens_are_no_numbers_where_a_token_left",
    "test_stages_that_are_compiled_are_exact",
    "test_stock_baseline_is_the_oracle",
    "test_two_stages_are_exact",
    "test_two_workers_are_exact",
    "test_what_is_shared_out_is_exact",
    "test_what_leaves_after_the_prefill_is_exact",
    "test_what_stays_takes_in_what_goes",
    "test_who_asks_for_what_patches_receive_has_pictures_encoded_for_it",
    "test_without_a_policy_stages_are_stock_vllms",
    "test_without_policy_equals_stock",
]
