"""Teaches the tiny model Chinese: trains a small BERT beside its image tower, which stays as it is.

    python examples/train_tiny_cn.py

writes paddle_clip/data/clip_tiny_cn.pt (cn_clip's names and form, half precision) and clip_tiny_cn.json beside it. Of
each scene the model "tiny" reads the English caption, and BERT learns to give the same feature for the Chinese one; no
picture is needed. The held-out combinations of train_tiny.py are held out of these captions too.
"""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import train_tiny  # before paddle: it sets how many cores Paddle uses

# isort: split
import numpy as np
import paddle
from tqdm import tqdm

import paddle_clip
import tiny_world
import tiny_world_cn
from paddle_clip.presets import TINY_CN

TEMPERATURE = 0.05  # of the softmax over the captions of a batch


def train(model, teacher, steps, seed, batch_size, rate=2e-3, log_every=100):
    """Trains BERT in place and returns [(step, mean loss since the step before)]."""
    parameters = [*model.bert.parameters(), model.text_projection]
    schedule = paddle.optimizer.lr.LinearWarmup(
        paddle.optimizer.lr.CosineAnnealingDecay(rate, max(1, steps - 100)), 100, 0.0, rate
    )
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    optimizer = paddle.optimizer.AdamW(schedule, beta2=0.98, weight_decay=0.05, parameters=parameters, grad_clip=clip)
    words, log, losses = model.bert.embeddings.word_embeddings.weight, [], []
    seen = np.zeros([model.vocab_size, 1], np.float32)
    for step in tqdm(range(1, steps + 1), disable=None):
        random = np.random.default_rng([seed, step])
        pairs = tiny_world.random_pairs(random, batch_size, train_tiny.variety(step / steps))
        with paddle.no_grad():
            truth = teacher.encode_text(teacher.tokenize([tiny_world.caption(*pair, random) for pair in pairs]))
        tokens = model.tokenize([tiny_world_cn.caption(*pair, random) for pair in pairs])
        seen[tokens.numpy()] = 1
        truth, ours = (x / x.norm(axis=-1, keepdim=True) for x in (truth, model.encode_text(tokens)))
        similarity = ours @ truth.t()  # [B, B]
        told_apart = paddle.nn.functional.cross_entropy(similarity / TEMPERATURE, paddle.arange(len(pairs)))
        loss = told_apart + 10 * (1 - similarity.diag()).mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        losses.append(loss.item())
        if step % log_every == 0 or step == steps:
            log.append((step, round(float(np.mean(losses)), 4)))
            print("step {}  loss {}".format(*log[-1]), flush=True)
            losses = []
    words.set_value(words * paddle.to_tensor(seen))  # words it has never read get zeros in place of their initial noise
    return log


def main():
    arguments = train_tiny.parse(__doc__.split("\n")[0], steps=4000)
    start = time.perf_counter()
    paddle.seed(arguments.seed)
    teacher, _ = paddle_clip.load("tiny")
    model = paddle_clip.presets.build(TINY_CN.config)
    model.visual.set_state_dict(teacher.visual.state_dict())
    model.logit_scale.set_value(teacher.logit_scale)
    model.eval()
    log = train(model, teacher, arguments.steps, arguments.seed, arguments.batch_size)
    path = os.path.join(arguments.output, TINY_CN.file)
    train_tiny.save(model, path)
    train_tiny.test_and_record(path, tiny_world_cn, arguments, log, start)


if __name__ == "__main__":
    main()
