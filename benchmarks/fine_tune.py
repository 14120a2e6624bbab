"""A fine-tune of all parameters for the measurements of `lrc delta`: a causal model trained on a text.

    python benchmarks/fine_tune.py MODEL TEXT OUT [--steps 150] [--batch 4] [--seq-len 256] [--rate 5e-5] [--threads 2]

AdamW without weight decay, a linear warm-up over a tenth of the steps, then a cosine to zero; windows are drawn at random with a
fixed seed. Trains in f32 and saves in the dtype of the source. It is no recipe for a good fine-tune, only for a real difference
between two checkpoints.
"""

import argparse
import math

import torch
import transformers

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("text")
parser.add_argument("out")
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--seq-len", type=int, default=256)
parser.add_argument("--rate", type=float, default=5e-5)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--chars", type=int, default=2_000_000, help="how much of the text is read")
args = parser.parse_args()

torch.set_num_threads(args.threads)
torch.manual_seed(0)
tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
stored = transformers.AutoConfig.from_pretrained(args.model).dtype or torch.float32
model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
with open(args.text, encoding="utf-8") as file:
    ids = torch.tensor(tokenizer(file.read(args.chars), add_special_tokens=False)["input_ids"])
print(f"{len(ids)} tokens, {sum(p.numel() for p in model.parameters())} parameters, saved as {stored}", flush=True)

optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.0)
warm_up = max(args.steps // 10, 1)


def rate(step):
    return min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))


schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
for step in range(args.steps):
    starts = torch.randint(len(ids) - args.seq_len, (args.batch,))
    batch = torch.stack([ids[start : start + args.seq_len] for start in starts])
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step + 1 == args.steps:
        print(f"step {step}: loss {loss.item():.4f}", flush=True)

model.to(stored).save_pretrained(args.out)
tokenizer.save_pretrained(args.out)
