# %% [markdown]
# # Lab 05: why is writing slow, and what does batching buy?
#
# You serve the transformer of lab 04, and beside it a model whose weights no cache holds. Before each measurement
# you write down what you expect. About a minute on a fast laptop; the same cells run on a GPU or a TPU, on one device.
#
# **Question.** A language model reads a prompt in one pass (*prefill*) and then writes one token a pass (*decode*).
# What does one written token cost, why, and what happens when 8 requests are decoded together?
#
# On Colab or Kaggle, run this in a cell of its own first, with `REPO` the address of this repository:
#
#     !git clone --depth 1 REPO gcompute-src
#     !python gcompute-src/tpu_scripts/colab_setup.py './gcompute-src[serve]'

# %%
# On Colab or Kaggle run tpu_scripts/colab_setup.py first, as above: it leaves the installed jax alone.
try:
    import httpx
    import jax
    import jax.numpy as jnp
    from matplotlib.figure import Figure

    from gcompute.lab.record import Record, lab_root
    from gcompute.serve.server import background
except ImportError as error:
    raise ImportError(f"{error}. In a checkout: pip install -e '.[serve]'. On Colab: the two lines above.") from None
import json
import sysconfig
import time
from functools import partial
from pathlib import Path

from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig
from gcompute.config.presets import PRESETS
from gcompute.config.serve import ServeConfig
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from gcompute.measure.roofline import load_or_measure
from gcompute.model.kv_cache import init_cache
from gcompute.model.pretrained import load
from gcompute.model.transformer import init
from gcompute.plan.params import count_params
from gcompute.serve.engine import Engine
from gcompute.serve.request import Sampling
from gcompute.train.corpus import prepare
from gcompute.train.loop import train

record = Record("05_inference")


def train_briefly(out):
    """A weaker stand-in for the checkpoint of lab 04."""
    data = DataConfig(data=str(Path(sysconfig.get_path("stdlib"), "asyncio")), tokenizer="byte")
    corpus = prepare(data, lab_root() / "corpus")
    config = ModelConfig(vocab=corpus.tokenizer.vocab_size, layers=4, dim=128, heads=4, context=128)
    training = TrainConfig(batch=16, steps=40, accumulation=4, mesh=MeshShape(), eval_every=0)
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=5)
    train(RunConfig(model=config, optimizer=optimizer, train=training, data=data), corpus, out=out)
    corpus.tokenizer.save(out / "tokenizer.json")
    return load(out)


try:
    small = load(lab_root() / "04_training")
except ValueError as error:
    print(f"{error} Training for a few seconds instead; run lab 04 for a better model.")
    small = train_briefly(record.directory / "model")

on_cpu = jax.default_backend() == "cpu"
PRECISION, NUM_BYTES = ("float32", 4) if on_cpu else ("bfloat16", 2)
LAYERS, DIM = (1, 2048) if on_cpu else (4, 4096)
large = ModelConfig(vocab=small.config.vocab, layers=LAYERS, dim=DIM, heads=DIM // 128, context=128)
# Random weights: what a pass costs depends on their number, not on their values.
models = {"small": (small.params, small.config), "large": (jax.jit(partial(init, large))(jax.random.key(0)), large)}
for name, (_, config) in models.items():
    num = count_params(config).total
    print(f"{name}: {num:,} parameters, {num * NUM_BYTES / 2**20:,.1f} MiB in {PRECISION}")

# %% [markdown]
# ## Predict
#
# Write your own three numbers and run the cell before you read on.

# %%
my_token_ms = None  # large model, one request: milliseconds for one written token, for instance 1
my_speedup_of_8 = None  # large model: tokens/s of 8 requests together / tokens/s of one, for instance 1.5
my_write_over_read = None  # small model: time to write 64 tokens / time to read 64, for instance 1
record.predict(token_ms=my_token_ms, speedup_of_8=my_speedup_of_8, write_over_read=my_write_over_read)

# %% [markdown]
# Now a plan. A pass over T tokens multiplies every weight T times, but reads it from memory *once*:
#
# time of a pass = max(2 × weights × T / matmul ceiling, bytes of weights and of cached keys and values / bandwidth)
#
# Decoding B requests together is a pass over B tokens; reading a prompt of T tokens is a pass over T.

# %%
roofline = load_or_measure(lab_root() / "roofline.json")
flops_per_s, bytes_per_s = roofline.matmul_flops_per_s[PRECISION], roofline.memory_bytes_per_s
print(f"{roofline.device_kind}: {flops_per_s / 1e9:,.0f} GFLOP/s, {bytes_per_s / 1e9:,.0f} GB/s")


def kv_bytes(config, num_tokens):
    """Keys and values of `num_tokens` tokens in every layer."""
    return 2 * config.layers * config.num_kv_heads * config.head_size * num_tokens * NUM_BYTES


def planned_pass_s(config, num_tokens, num_cached):
    weights = count_params(config).matmul
    compute_s = 2 * weights * num_tokens / flops_per_s
    return max(compute_s, (weights * NUM_BYTES + kv_bytes(config, num_cached)) / bytes_per_s)


SLOTS, CELLS = (1, 2, 4, 8), 16
planned_s = {name: [planned_pass_s(config, b, b * CELLS) for b in SLOTS] for name, (_, config) in models.items()}
record.note("planned", slots=SLOTS, step_s=planned_s)
for name, steps_s in planned_s.items():
    print(f"{name}: a step for 1, 2, 4, 8 requests takes at least", *(f"{s * 1e3:.3f}" for s in steps_s), "ms")

# %% [markdown]
# ## Measure: batching
#
# The engine of `gcompute serve`, with 1, 2, 4 and 8 slots, all full: milliseconds between two tokens of one
# request.


# %%
def measured_step_s(params, config, slots):
    num_prompt, num_written = 4, CELLS - 4
    sampling = Sampling(max_tokens=num_written, temperature=0, ignore_eos=True)
    prompts = [[10 + slot] * num_prompt for slot in range(slots)]
    with Engine(params, config, None, ServeConfig(slots=slots, precision=PRECISION, max_context=CELLS)) as engine:
        rounds = [engine.generate(prompts, sampling)[-1] for _ in range(8)]
    # The best round: what the machine can do when nothing else disturbs it.
    return min(done.timing.per_token_s(num_written) for done in rounds)


measured_s = {}
for name, (params, config) in models.items():
    measured_s[name] = [measured_step_s(params, config, slots) for slots in SLOTS]
    record.note("measured", model=name, slots=SLOTS, step_s=measured_s[name])
    for slots, planned, seen in zip(SLOTS, planned_s[name], measured_s[name], strict=True):
        print(f"{name}, {slots} slots: planned {planned * 1e3:.3f} ms a step, measured {seen * 1e3:.3f} ms")

# %% [markdown]
# ## Picture: tokens a second

# %%
figure = Figure(figsize=(10, 4), layout="constrained")
for axes, name in zip(figure.subplots(1, 2), models, strict=True):
    for steps_s, style, label in ((planned_s, "--", "planned"), (measured_s, "o-", "measured")):
        rate = [slots / step_s for slots, step_s in zip(SLOTS, steps_s[name], strict=True)]
        axes.plot(SLOTS, rate, style, color="#777777" if label == "planned" else "#4c78a8", label=label)
    ideal = [slots / measured_s[name][0] for slots in SLOTS]
    axes.plot(SLOTS, ideal, ":", color="#e45756", label="measured at 1, times B")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="requests decoded together", ylabel="tokens/s, all requests")
    axes.set_xticks(SLOTS, [str(slots) for slots in SLOTS])
    axes.set_title(f"{name}: {count_params(models[name][1]).total / 1e6:,.1f} million parameters")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
record.show(figure, "batching.png")

# %% [markdown]
# ## Measure: reading against writing
#
# The small model reads 64 bytes of Python, then writes 64.

# %%
engine = Engine(small.params, small.config, small.tokenizer, ServeConfig(slots=8, precision=PRECISION, port=0))
engine.start()
engine.wait_ready()
PROMPT = "import os\n\nclass Loop:\n    def __init__(self):\n        self._loo"  # 64 bytes
sampling = Sampling(max_tokens=64, temperature=0, ignore_eos=True)
rounds = [engine.generate([PROMPT], sampling)[0] for _ in range(8)]
read_s = min(done.timing.first_token_s for done in rounds)
token_s = min(done.timing.per_token_s(64) for done in rounds)
record.note("read and written", num_prompt=rounds[0].usage.prompt_tokens, read_s=read_s, written_s=64 * token_s)
print(f"64 read in {read_s * 1e3:.2f} ms, the time to first token; 64 written in {64 * token_s * 1e3:.2f} ms")

# %% [markdown]
# ## Yours, the planner's, the machine's

# %%
big, little = measured_s["large"], planned_s["small"][0]
record.compare(
    "token_ms",
    planned=planned_s["large"][0] * 1e3,
    measured=big[0] * 1e3,
    mistakes={"the multiplications alone: they wait for the weights": 2e3 * count_params(large).matmul / flops_per_s},
)
record.compare(
    "speedup_of_8",
    planned=8 * planned_s["large"][0] / planned_s["large"][-1],
    measured=8 * big[0] / big[-1],
    mistakes={"no gain: as if each request needed the weights read for itself": 1},
)
record.compare(
    "write_over_read",
    planned=64 * little / planned_pass_s(small.config, 64, 64),
    measured=64 * token_s / read_s,
    mistakes={"equal work in equal time: but writing reads all weights once a token": 1},
)

# %% [markdown]
# ## Serve it
#
# The same engine behind HTTP, and one completion as a client sees it: a wait (time to first token), then a steady
# stream. It comes 8 tokens at a time, because the engine decodes up to 8 before it looks up (`decode_steps`).

# %%
body = {"model": "lab", "prompt": PROMPT, "max_tokens": 64, "temperature": 0.5, "seed": 1, "stream": True}
arrivals, num_characters = [(0.0, 0)], 0
with (
    background(engine, ServeConfig(port=0), model_name="lab") as url,
    httpx.Client(base_url=url, trust_env=False, timeout=60) as client,  # no proxy from the environment
):
    client.get("/health").raise_for_status()  # opens the connection, which is no part of the time to first token
    print(f"POST {url}/v1/completions\n{PROMPT}", end="")
    started = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text = json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                num_characters += len(text)
                arrivals.append((time.perf_counter() - started, num_characters))
                print(text, end="", flush=True)
print()
record.note("streamed", arrivals=arrivals)
figure = Figure(figsize=(8, 3.2), layout="constrained")
axes = figure.subplots()
times_ms = [1e3 * seconds for seconds, _ in arrivals]
axes.step(times_ms, [num for _, num in arrivals], where="post", color="#4c78a8")
axes.axvspan(0, times_ms[1], color="#e45756", alpha=0.15, label="time to first token")
axes.set(xlabel="ms since the request was sent", ylabel="characters received", xlim=(0, None), ylim=(0, None))
axes.legend(frameon=False, loc="upper left")
axes.grid(alpha=0.25)
record.show(figure, "stream.png")

# %% [markdown]
# ## Memory of the cache

# %%
engine.close()
cache = init_cache(small.config, batch=8, length=small.config.context, dtype=jnp.dtype(PRECISION))
array_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
planned_bytes = kv_bytes(small.config, 8 * small.config.context)
print(f"small, 8 slots of {small.config.context} tokens: planned {planned_bytes:,} bytes, the arrays {array_bytes:,}")
record.note("cache", planned_bytes=planned_bytes, array_bytes=array_bytes)
llama = PRESETS["llama3-8b"]
token_bytes = 2 * llama.layers * llama.num_kv_heads * llama.head_size * 2
print(f"llama3-8b in bfloat16: weights {2 * count_params(llama).total / 2**30:.1f} GiB; cache")
print(f"  {token_bytes / 2**10:.0f} KiB a token, {token_bytes * 8192 / 2**30:.1f} GiB for a request of 8,192 tokens")

# %% [markdown]
# ## Explanation
#
# - **Decode waits for memory.** One request uses each weight for one multiplication and one addition, then throws
#   it away. A chip could do tens to hundreds in that time. At 3.35 TB/s, the 16 GB of llama3-8b allow at most 209
#   tokens/s to one request, however many FLOP/s the chip has.
# - **Batching shares the reading.** 8 requests use each weight 8 times for one reading, so a step takes hardly longer
#   and tokens/s rise almost with B, until the matmuls fill the step or the caches of the requests outweigh the
#   weights. A CPU with few cores gets there early, and its second request may gain nothing: a product with one vector
#   runs at the speed of memory, a product with a few rows does not yet.
# - **Prefill is a batch in itself.** 64 tokens of one prompt share a reading of the weights: time to first token is
#   made of waiting and one pass, the rest of the answer of one pass a token.
# - **Small models are different.** A CPU's caches hold all of the small model, so it may beat a plan that reads the
#   weights from memory. On a GPU or TPU its step is dozens of tiny operations, each with a start-up cost that the
#   plan leaves out, and lies far above it. Do not judge a chip by a small model.
#
# ## Exercise
#
# How many requests fit a chip? `exercise.py` beside this lab asks for it, and knows the usual mistakes. It is meant
# to fail until you solve it:
#
#     python labs/05_inference/exercise.py                  # Colab: !python gcompute-src/labs/05_inference/exercise.py
#
# ## Quiz
#
# Answer aloud, then open.
#
# 1. Which memory holds the weights while a model answers: (a) the disk, (b) the device's own memory (HBM, VRAM; RAM
#    on a CPU), (c) the registers?
# 2. What raises throughput by processing requests together: (a) batching, (b) quantisation, (c) a longer context?
# 3. In which phase do latency and cost an answer come first: (a) training, (b) inference, (c) tokenizer training?
# 4. The time to first token is bad while the time per token is good. What to look at: (a) the bandwidth, (b) the
#    queue and the length of prompts, (c) the learning rate?
#
# <details><summary>Answers</summary>
#
# 1. **b**: they are read once a step, which only the device's memory can feed. (a) is read once, at the start; (c)
#    hold a few kilobytes.
# 2. **a**: one reading of the weights for many requests. (b) makes the reading shorter, for each request alone too;
#    (c) adds cache to read.
# 3. **b**: someone waits for every answer and each is paid for. (a) is long, but done once, and nobody waits for a
#    step.
# 4. **b**: the first token waits for a slot and for the whole prompt. (a) would slow every token alike.
#
# </details>
