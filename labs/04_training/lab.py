# %% [markdown]
# # Lab 04: what does a training step cost?
#
# You train a small transformer on real text: the source of Python's own `asyncio`. Before each measurement you
# write down what you expect. About a minute on a fast laptop, up to five on two old cores; the same cells run on a GPU
# or a TPU, on one device of however many there are.
#
# **Question.** The model has 837 thousand parameters, 3.2 MiB in float32. How much memory does one training step
# need, how long does it take, and what changes when the batch is cut into 8 pieces?
#
# On Colab or Kaggle, run this in a cell of its own first, with `REPO` the address of this repository:
#
#     !git clone --depth 1 REPO gcompute-src
#     !python gcompute-src/tpu_scripts/colab_setup.py './gcompute-src[serve]'

# %%
# On Colab or Kaggle run tpu_scripts/colab_setup.py first, as above: it leaves the installed jax alone.
try:
    import jax
    import numpy as np
    from matplotlib.figure import Figure

    from gcompute.lab.record import Record, lab_root
except ImportError as error:
    raise ImportError(f"{error}. In a checkout: pip install -e '.[serve]'. On Colab: the two lines above.") from None
import sysconfig
import time
from pathlib import Path

from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from gcompute.measure.roofline import load_or_measure
from gcompute.plan.memory import train_memory
from gcompute.plan.params import count_params
from gcompute.plan.precision import choose_precision
from gcompute.plan.train_step import predict_train_step, train_flops
from gcompute.train.corpus import prepare
from gcompute.train.curve import plot_loss
from gcompute.train.data import BatchSource
from gcompute.train.events import Evaluated
from gcompute.train.loop import train
from gcompute.train.metrics_log import read_metrics
from gcompute.train.ngram import bigram_loss, unigram_loss
from gcompute.train.programs import build_programs, place

record = Record("04_training")
DATA = DataConfig(data=str(Path(sysconfig.get_path("stdlib"), "asyncio")), tokenizer="byte")
corpus = prepare(DATA, lab_root() / "corpus")
MODEL = ModelConfig(vocab=corpus.tokenizer.vocab_size, layers=4, dim=128, heads=4, context=128)
BATCH, SEQ, STEPS, PIECES = 16, MODEL.context, 200, (1, 2, 4, 8)
TOKENS, MIB = BATCH * SEQ, 2**20
num_params = count_params(MODEL).total
print(f"{len(corpus.train):,} training bytes; {num_params:,} parameters; {TOKENS:,} tokens per step")
roofline = load_or_measure(lab_root() / "roofline.json")
PRECISION, reason = choose_precision(roofline.matmul_flops_per_s)
print(f"{PRECISION} ({reason})")
print(corpus.tokenizer.decode(corpus.train[:160].tolist()))

# %% [markdown]
# ## Predict
#
# Write your own three numbers and run the cell before you read on. A guess is fine; an empty one teaches less. The
# optimizer is AdamW; matmuls take the dtype that this machine multiplies faster (the cell above says which), everything
# else is float32, and nothing is recomputed.

# %%
my_memory_mib = None  # memory of one step, in MiB: for instance 40
my_step_ms = None  # time of one step on this machine, in milliseconds: for instance 5
my_ratio_of_8_pieces = None  # time of a step in 8 pieces / time of a step in one: for instance 3
record.predict(memory_mib=my_memory_mib, step_ms=my_step_ms, ratio_of_8_pieces=my_ratio_of_8_pieces)

# %% [markdown]
# Now the planner's. It knows the model's shape and two ceilings of this machine, measured above: how fast it
# multiplies matrices, and how fast it reads memory. It has never seen a training step run.

# %%
peak_flops_per_s = roofline.matmul_flops_per_s[PRECISION]
ceilings = {"roofline_flops_per_s": peak_flops_per_s, "memory_bytes_per_s": roofline.memory_bytes_per_s}
print(f"{roofline.device_kind}: {peak_flops_per_s / 1e9:,.0f} GFLOP/s, {roofline.memory_bytes_per_s / 1e9:,.0f} GB/s")
planned_memory, planned_s = {}, {}
for n in PIECES:
    work = {"batch": BATCH, "seq": SEQ, "accumulation": n, "precision": PRECISION}
    planned_memory[n] = train_memory(MODEL, **work)
    planned_s[n] = predict_train_step(MODEL, **work, **ceilings).step_s
    print(f"{n} pieces: {planned_memory[n].total_bytes / MIB:6.1f} MiB, {planned_s[n] * 1e3:6.2f} ms")
    record.note("planned", pieces=n, memory=planned_memory[n].to_dict(), step_s=planned_s[n])

# %% [markdown]
# ## Measure
#
# The same two steps from the same start, with the batch in 1, 2, 4 and 8 pieces (`accumulation`). The compiler says
# how much memory its program needs, the clock says the rest. Do the losses depend on the pieces?


# %%
def run_config(pieces, **changes):
    values = {"batch": BATCH, "steps": STEPS, "accumulation": pieces, "mesh": MeshShape(), "checkpoint_every": 0}
    values["precision"] = PRECISION
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=20)
    return RunConfig(model=MODEL, optimizer=optimizer, train=TrainConfig(**{**values, **changes}), data=DATA)


rows = BatchSource(tokens=corpus.train, seq=SEQ, batch=BATCH, seed=0).stack(0, 2)
compiled_bytes, measured_s, losses = {}, {}, {}
for n in PIECES:
    programs = build_programs(run_config(n, dispatch_steps=2))
    needs = programs.steps.memory_analysis()
    compiled_bytes[n] = needs.argument_size_in_bytes + needs.temp_size_in_bytes
    inputs, targets = (place(side, programs.batch_sharding) for side in rows)
    state, times = programs.init(jax.random.key(0)), []
    count = place(np.asarray(2, np.int32), state.step.sharding)
    for _ in range(5):
        started = time.perf_counter()
        state, metrics = programs.steps(state, inputs, targets, count)
        loss = jax.device_get(metrics.loss).tolist()
        times.append((time.perf_counter() - started) / 2)
        losses.setdefault(n, loss)
    measured_s[n] = min(times[1:])  # the first pays for page faults and cold caches
    print(f"{n} pieces: {compiled_bytes[n] / MIB:6.1f} MiB, {measured_s[n] * 1e3:6.2f} ms, losses {losses[n]}")
    record.note("measured", pieces=n, memory_bytes=compiled_bytes[n], step_s=measured_s[n], losses=losses[n])

# %% [markdown]
# ## Picture: where the memory goes

# %%
figure = Figure(figsize=(10, 4), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=(3, 2))
places, bottom = np.arange(len(PIECES)), np.zeros(len(PIECES))
parts = {
    "parameters": ("parameters_bytes", "#4c78a8"),
    "gradients": ("gradients_bytes", "#72b7b2"),
    "sum of the pieces' gradients": ("accumulator_bytes", "#9ecae9"),
    "Adam's two moments": ("optimizer_bytes", "#54a24b"),
    "activations": ("activations_bytes", "#e45756"),
}
for name, (field, colour) in parts.items():
    height = np.array([getattr(planned_memory[n], field) / MIB for n in PIECES])
    left.bar(places - 0.2, height, 0.36, bottom=bottom, color=colour, label=f"planned: {name}")
    bottom += height
rest = np.array([planned_memory[n].total_bytes / MIB for n in PIECES]) - bottom
left.bar(places - 0.2, rest, 0.36, bottom=bottom, color="#f2b8b5", label="planned: working space, copies")
left.bar(places + 0.2, [compiled_bytes[n] / MIB for n in PIECES], 0.36, color="#bbbbbb", label="the compiler's total")
left.set(ylabel="MiB", title="memory of one step")
right.plot(places, [planned_s[n] * 1e3 for n in PIECES], "--", color="#777777", label="planned")
right.plot(places, [measured_s[n] * 1e3 for n in PIECES], "o-", color="#4c78a8", label="measured")
right.set(ylabel="ms", title="time of one step", ylim=(0, None))
for axes in (left, right):
    axes.set_xticks(places, [str(n) for n in PIECES])
    axes.set_xlabel("pieces of the batch")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
record.show(figure, "memory.png")

# %% [markdown]
# ## Yours, the planner's, the machine's

# %%
record.compare(
    "memory_mib",
    planned=planned_memory[1].total_bytes / MIB,
    measured=compiled_bytes[1] / MIB,
    mistakes={
        "the parameters alone: enough to run the model, not to train it": 4 * num_params / MIB,
        "16 bytes a parameter (weights, gradients, moments): the activations are missing": 16 * num_params / MIB,
    },
)
all_flops = train_flops(MODEL, batch=BATCH, seq=SEQ).step_flops
record.compare(
    "step_ms",
    planned=planned_s[1] * 1e3,
    measured=measured_s[1] * 1e3,
    mistakes={
        "2 operations a parameter and token: the forward pass alone": 2e3 * num_params * TOKENS / peak_flops_per_s,
        "all matmuls at the ceiling, as if nothing between them moved a byte": 1e3 * all_flops / peak_flops_per_s,
    },
)
record.compare(
    "ratio_of_8_pieces",
    planned=planned_s[8] / planned_s[1],
    measured=measured_s[8] / measured_s[1],
    mistakes={"8 whole steps: but each piece is an eighth of the work": 8, "one piece of 8: all must be done": 1 / 8},
)

# %% [markdown]
# ## Explanation
#
# - **Memory.** Parameters, gradients and Adam's moments take 16 bytes a parameter: 13 MiB. Nearly all the rest is
#   *activations*, which the forward pass keeps for the backward pass. They grow with tokens × layers, and those of
#   attention with the square of the sequence. Inference keeps none: a chip that serves a model may be too small to
#   train it.
# - **Time.** Matmuls cost 6 operations a parameter and token: 2 forward, 4 backward. Between them, norms, softmax
#   and activation functions read and write memory and hardly compute. The plan is close to a floor: it knows no
#   page faults, no start-up of small operations, no other programs. On CPU expect 1 to 5 times the plan for a model
#   this small.
# - **Pieces.** The losses agree to five digits or more (the sums run in another order) and memory falls, because
#   only one piece's activations live at a time. The work stays the same, so the time nearly does. On CPU it may
#   fall, as a small piece stays in the caches; on a GPU or TPU it rises once a piece is too small to fill the chip.
#
# ## Train
#
# In as many pieces as you measured to be fastest. To beat: a unigram model (how often each byte occurs) and a
# bigram model (which byte follows which). Guess first: can 200 steps, less than one pass over the text, beat them?

# %%
fastest = min(PIECES, key=measured_s.__getitem__)
corpus.tokenizer.save(record.directory / "tokenizer.json")


def report(event):
    if isinstance(event, Evaluated):
        print(f"step {event.step}: validation loss {event.loss:.3f} nats a byte")


config = run_config(fastest, eval_every=50, eval_batches=4, final_eval_batches=0)
result = train(config, corpus, out=record.directory, peak_flops_per_s=peak_flops_per_s, report=report)
sides = (corpus.train, corpus.val, MODEL.vocab)
baselines = {"unigram": unigram_loss(*sides), "bigram": bigram_loss(*sides)}
record.note("trained", pieces=fastest, val_loss=result.val_loss, baselines=baselines, step_s=result.step_s)
rows = read_metrics(record.directory / "metrics.jsonl")
plot_loss(rows, record.directory / "loss.png", title="Lab 04: loss by step", baselines=baselines)
record.show_file("loss.png")
print(f"{result.tokens_per_s:,.0f} tokens/s; lab 05 serves the checkpoint in {record.directory}")

# %% [markdown]
# Attention is what a bigram model lacks: it looks back over 128 bytes, at the indentation, the name being spelled,
# the bracket still open. Nats divided by 0.693 are bits: a byte, which takes 8, holds fewer than 2.
#
# ## Exercise
#
# Real batches have pieces of unequal size. `exercise.py` beside this lab asks you to combine their losses and
# gradients, and knows the usual mistakes. It is meant to fail until you solve it:
#
#     python labs/04_training/exercise.py                    # Colab: !python gcompute-src/labs/04_training/exercise.py
#
# ## Quiz
#
# Answer aloud, then open.
#
# 1. Which hardware suits parallel matrix operations: (a) a few fast cores, (b) thousands of simple multipliers fed
#    by fast memory, (c) a faster disk?
# 2. Training runs out of memory. Which change helps first and costs no quality: (a) fewer layers, (b) more pieces a
#    step, (c) a smaller learning rate?
# 3. Which resource is most often the first bottleneck of training: (a) disk space, (b) memory on the device, (c)
#    cores?
#
# <details><summary>Answers</summary>
#
# 1. **b**: every output of a matrix product can be computed at once. (a) suits branching, sequential code; (c)
#    feeds data once, not at every multiplication.
# 2. **b**: same loss, a fraction of the activations. (a) makes another model; (c) moves no byte.
# 3. **b**: states at 16 bytes a parameter, and the activations above them, must fit before any speed counts. (a)
#    fills slowly; (c) waits for memory more often than the other way round.
#
# </details>
