"""All rules, sorted by code."""

from batchnorm.doctor.rule import Rule
from batchnorm.doctor.rules import (
    bn001_unsafe_globals,
    bn002_checksum_mismatch,
    bn003_inconsistent_sizes,
    bn004_damaged_container,
    bn005_unfit_names,
    bn100_missing_statistics,
    bn101_initial_statistics,
    bn102_impossible_statistics,
    bn103_collapsed_variance,
    bn104_dead_channels,
    bn105_odd_counters,
    bn106_doubled_counter,
    bn107_narrow_statistics,
    bn109_converted_model,
)

RULES: tuple[Rule, ...] = (
    bn001_unsafe_globals.RULE,
    bn002_checksum_mismatch.RULE,
    bn003_inconsistent_sizes.RULE,
    bn004_damaged_container.RULE,
    bn005_unfit_names.RULE,
    bn100_missing_statistics.RULE,
    bn101_initial_statistics.RULE,
    bn102_impossible_statistics.RULE,
    bn103_collapsed_variance.RULE,
    bn104_dead_channels.RULE,
    bn105_odd_counters.RULE,
    bn106_doubled_counter.RULE,
    bn107_narrow_statistics.RULE,
    bn109_converted_model.RULE,
)
