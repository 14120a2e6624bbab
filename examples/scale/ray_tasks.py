"""A plan in Ray: `python ray_tasks.py PLAN OUT`, after `lrc plan MODEL -o PLAN ... --tasks 4`."""

import json
import subprocess
import sys

import ray

plan, out = sys.argv[1:]
with open(f"{plan}/plan.json") as file:
    stages = json.load(file)["stages"]


# All nodes have the files of the plan. A killed task is tried again, and resumes.
@ray.remote(max_retries=3, retry_exceptions=True)
def task(index):
    subprocess.run(["lrc", "task", plan, "--index", str(index), "-q"], check=True)


ray.init()  # on a cluster: address="auto"; task.options(num_cpus=16) says what a task takes
for stage in stages:
    ray.get([task.remote(stage["first"] + i) for i in range(stage["tasks"])])
    print(f"stage {stage['name']}: {stage['tasks']} tasks", flush=True)
subprocess.run(["lrc", "finish", plan, "-o", out, "-q"], check=True)
