"""Golden cases by family."""

from . import cohere, dense, experts, gemma, gpt, phi, renamed, vision

CASES = {}
for module in (gemma, dense, phi, cohere, gpt, renamed, experts, vision):
    assert not CASES.keys() & module.CASES.keys()
    CASES.update(module.CASES)
