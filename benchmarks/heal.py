"""Healing of compressed models: perplexity and divergence before and after, by stage. Needs nothing but Python, the program and the texts.

    python benchmarks/heal.py MODEL WORK LRC --calibration FILE... --evaluation FILE...
        [--kinds low-rank@0.8,narrow@0.6,…] [--stages blocks,model,closed] [--samples N] [--epochs N] [--rates R,…] [--model RATE,BATCH,EPOCHS[,LABELS]]

Each kind is compressed in the metric of statistics of the calibration texts (64 windows, measured once into WORK; of several texts as
many of each), and then healed by every list of stages at every rate. `blocks+model` is the stage `model` on the output of the stage `blocks`, whose
minutes are counted too; the stage `model` has a rate, a batch, epochs and a share of labels of its own. A row has the rate of its last stage.
Texts are mixed by `--text a:weight`. In a cell are perplexity and KL from the source in nats per token on the first windows of each
evaluation text; after it the elapsed and the processor minutes and the peak memory. What is in WORK already is not made again.
"""

import argparse
import json
import pathlib
import subprocess

KINDS = {
    "low-rank": ["--sequential=false"],
    "blast": ["--layout", "blast"],
    "narrow": ["--structure", "narrow"],
    "joint": ["--structure", "narrow,low-rank"],
    "int3": ["--quant", "cd-int3-g64"],
    "rtn3": ["--quant", "rtn-int3-g32"],
}

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("work", type=pathlib.Path)
parser.add_argument("lrc")
parser.add_argument("--calibration", nargs="+", required=True, help="FILE or FILE:WEIGHT")
parser.add_argument("--evaluation", nargs="+", required=True)
parser.add_argument("--kinds", default="low-rank@0.9,low-rank@0.8,low-rank@0.6,narrow@0.8,joint@0.8,joint@0.6,int3")
parser.add_argument("--stages", default="blocks,blocks+model,closed")
parser.add_argument("--rates", default="2e-4")
parser.add_argument("--model", dest="whole", default="2e-4,2,4", help="rate or `auto`, batch, epochs, share of labels of the stage `model`")
parser.add_argument("--statistics")
for name, default in [("samples", "64"), ("epochs", "4"), ("batch", "2"), ("seq-len", "512"), ("windows", "4"), ("eval-seq-len", "1024")]:
    parser.add_argument(f"--{name}", default=default)
args = parser.parse_args()
args.work.mkdir(parents=True, exist_ok=True)


def run(*command):
    """The output, elapsed and processor minutes, and the peak memory in GB."""
    log = args.work / "time"
    timed = ["/usr/bin/time", "-f", "%e %U %M", "-o", log, args.lrc, *map(str, command)]
    out = subprocess.run(timed, check=True, stdout=subprocess.PIPE, text=True)
    elapsed, processor, kilobytes = map(float, log.read_text().split())
    return out.stdout, [elapsed / 60, processor / 60, kilobytes * 1024 / 1e9]


statistics = pathlib.Path(args.statistics or args.work / "statistics.safetensors")
if not statistics.exists():
    texts = [argument for text in args.calibration for argument in ("--text", text.split(":")[0])]
    run("calibrate", args.model, *texts, "--method", "kfac", "--samples", 64, "--seq-len", args.seq_len, "-o", statistics, "-q")


def scored(folder):
    cells = []
    for text in args.evaluation:
        found = args.work / f"{pathlib.Path(folder).name}-{pathlib.Path(text).stem}.json"
        if not found.exists():
            reference = [] if folder == args.model else ["--reference", args.model]
            scoring = ["--seq-len", args.eval_seq_len, "--max-windows", args.windows, "--bos", "never"]
            report = json.loads(run("eval", folder, *reference, "--text", text, *scoring, "--json", "-q")[0])
            found.write_text(json.dumps([report["ppl"], report["kl"]["mean"] if reference else 0.0]))
        ppl, kl = json.loads(found.read_text())
        cells.append(f"{ppl:.3f} | {kl:.4f}")
    return " | ".join(cells)


def cost(name, folder, command):
    """What it took to make a folder."""
    found = args.work / f"{name}.cost"
    if not found.exists():
        found.write_text(json.dumps(run(*command, "-o", folder, "-q", "--force")[1]))
    return json.loads(found.read_text())


def shown(spent):
    elapsed, processor, memory = zip(*spent)
    return f"{sum(elapsed):.1f} | {sum(processor):.1f} | {max(memory):.2f}"


def row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


heads = " | ".join(f"{pathlib.Path(text).stem} | KL" for text in args.evaluation)
row("kind", "stages", "rate", heads, "min", "processor min", "GB")
row(*["---"] * (6 + 2 * len(args.evaluation)))
row("source", "", "", scored(args.model), "", "", "")
for kind in args.kinds.split(","):
    structure, _, keep = kind.partition("@")
    before = args.work / kind
    budget = ["--keep", keep] if keep else []
    spent = cost(kind, before, ["compress", args.model, *KINDS[structure], *budget, "--statistics", statistics])
    row(kind, "before", "", scored(before), shown([spent]))
    for stages in args.stages.split(","):
        for rate in args.rates.split(","):
            last, name, spent = before, kind, []
            for stage in stages.split("+"):
                of_stage = args.whole.split(",") if stage == "model" else [rate, args.batch, args.epochs]
                name = "-".join([name, stage, *of_stage, args.samples])
                how = ["--stage", stage, "--samples", args.samples, "--seq-len", args.seq_len, "--seed", 1, "--statistics", statistics]
                how += ["--batch", of_stage[1], "--epochs", of_stage[2]] + (["--learning-rate", of_stage[0]] if of_stage[0] != "auto" else [])
                how += ["--labels", of_stage[3]] if len(of_stage) > 3 else []
                texts = [argument for text in args.calibration for argument in ("--text", text)]
                spent.append(cost(name, args.work / name, ["heal", last, "--teacher", args.model, *texts, *how]))
                last = args.work / name
            row(kind, stages, ", labels ".join([of_stage[0], *of_stage[3:]]), scored(last), shown(spent))
