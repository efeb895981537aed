"""One lowering of `headpool::GroupedAttention` a file. Each has

    check(node) -> str | None          the reason why it does not apply to this node, or None
    rewrite(node, emit) -> (output, present_key, present_value)
    finish(model)               optional: what is left to do when all nodes are rewritten
    store(model, cache)         optional: the caches in a form of graphs/caches.py, after that

and the table below names them all.
"""

from graphs.patterns import attention, fused, gqa, grouped, repeat

PATTERNS = {"repeat": repeat, "grouped": grouped, "attention": attention, "gqa": gqa, "fused": fused}
