"""All rules, sorted by code."""

from batchnorm.doctor.rule import Rule
from batchnorm.doctor.rules import (
    bn001_unsafe_globals,
    bn002_checksum_mismatch,
    bn003_inconsistent_sizes,
    bn004_damaged_container,
    bn005_unfit_names,
    bn100_missing_statistics,
)

RULES: tuple[Rule, ...] = (
    bn001_unsafe_globals.RULE,
    bn002_checksum_mismatch.RULE,
    bn003_inconsistent_sizes.RULE,
    bn004_damaged_container.RULE,
    bn005_unfit_names.RULE,
    bn100_missing_statistics.RULE,
)
