"""The page of a rule: the docstring of its module, in Markdown."""

import inspect
import sys

from batchnorm.doctor.rule import Rule


def page(rule: Rule) -> str:
    """What the rule finds, why that is bad, how it arises, the evidence, what to do, and when the rule is wrong.

    Example:
        >>> from batchnorm.doctor.catalogue import RULES
        >>> page(RULES[0]).splitlines()[0]
        '# BN001...'
    """
    # Python drops docstrings under -OO
    text = sys.modules[rule.check.__module__].__doc__ or f"# {rule.code}: {rule.name}\n\n{rule.summary}"
    return inspect.cleandoc(text) + "\n"
