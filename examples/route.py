"""Routed depth: an eighth of the tokens goes through a block, the others pass by; and a model that writes so.

    python examples/route.py
"""
import time

import numpy as np

import forge_c as fc
from forge_c import nn

D, TOKENS = 256, 1024
rng = np.random.default_rng(0)
block = nn.ModernTransformerBlock(d_model=D, n_heads=8, n_kv_heads=2, seed=0)
x = rng.standard_normal((1, TOKENS, D), np.float32)


def milliseconds(call):
    call()
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


# As in training: of the whole text the tokens with the largest logits.
routed = nn.MixtureOfDepths(block, D, capacity=0.125, seed=1)
indices, gate = fc.route_tokens(x, routed.router, capacity=0.125)
y = routed(x)
passed_by = np.setdiff1d(np.arange(TOKENS), indices[0])
print(f"{indices.shape[1]} of {TOKENS} tokens go through, logits {gate.min():.2f} to {gate.max():.2f}; "
      f"the others are untouched: {bool((y[0, passed_by] == x[0, passed_by]).all())}")
print(f"the block {milliseconds(lambda: block(x)):.1f} ms, routed {milliseconds(lambda: routed(x)):.1f} ms")

# To write token by token, each decides for itself: by its logit, here, at a threshold that about an eighth is above.
causal = nn.MixtureOfDepths(block, D, mode="threshold", threshold=float(gate.min()), seed=1)
whole, cache, parts = causal(x), None, []
for start in range(0, TOKENS, 128):
    part, cache = causal(x[:, start : start + 128], use_cache=True, kv_cache=cache)
    parts.append(part)
print(f"in pieces, with a cache of the {cache.lengths[0]} tokens that went through, the same bits: "
      f"{np.concatenate(parts, axis=1).tobytes() == whole.tobytes()}")

# A model of four layers, two of them with routers.
model = fc.models.random_model("llama-tiny-mod")
prompt = rng.integers(0, 512, 64)
memory = model.new_cache()
ids = model.generate(prompt, 16, cache=memory)
for i, layer in enumerate(memory.layers):
    print(f"layer {i} remembers {int(layer.lengths[0])} of {memory.seq_len} tokens")
print("it continues with", ids.tolist())
