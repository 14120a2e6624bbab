//! `lrc plan`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use bytesize::ByteSize;
use clap::Args;
use indicatif::HumanDuration;

use super::arguments::{
    DequantizeArgs, DeviceArgs, JsonArgs, MemoryArgs, OpenArgs, OutputArgs, RevisionArgs, SourceArgs, at_least_1,
};
use super::options::{All, Options, RecipeFile};
use super::streams::{print, print_json};
use super::terminal::{Bars, table};
use crate::checkpoint::{Checkpoint, Existing, OutputFolder, expect_apart};
use crate::compress::recipe::{Recipe, RecipeOptions};
use crate::compress::tasks::{self, Origin, PLAN_FILE};
use crate::compress::{self, Job};
use crate::device::DeviceChoice;
use crate::error::Failure;
use crate::report::{StageRecord, TaskPlan};

/// Plan a compression in tasks for several machines
///
/// Takes the arguments of `lrc compress`, and writes a folder with `plan.json`.
/// `lrc task PLAN --index K` runs a task, and `lrc finish PLAN -o OUT` makes the
/// output: the same bytes as `lrc compress`. The machines share PLAN, the model
/// and the texts.
///
/// Examples:
///   lrc plan MODEL -o PLAN --keep 0.8 --calibration text.txt --tasks 4
///   for K in $(seq 0 11); do lrc task PLAN --index $K; done
///   lrc finish PLAN -o OUT
#[derive(Debug, Args)]
#[command(
    verbatim_doc_comment,
    mut_arg("output", |output| output.value_name("PLAN").help("Folder of the plan and of the work of its tasks")),
)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    model: SourceArgs,

    #[command(flatten)]
    dequantize: DequantizeArgs,

    #[command(flatten)]
    options: Options<All>,

    #[command(flatten)]
    recipe: RecipeFile,

    #[command(flatten)]
    memory: MemoryArgs,

    #[command(flatten)]
    device: DeviceArgs,

    /// Most tasks of a stage, which can run side by side
    #[arg(long, value_name = "N", value_parser = at_least_1, help_heading = "Output")]
    tasks: usize,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    json: JsonArgs,
}

pub(super) fn run(args: &PlanArgs, quiet: bool, progress: &Bars) -> Result<()> {
    let folder = args.output.output.as_path();
    if folder.join(PLAN_FILE).exists() {
        return Err(Failure::usage(format!("`{}` has a plan already", folder.display()))
            .hint("choose another folder, or remove it with the work of its tasks")
            .into());
    }
    let options = args.recipe.complete(&args.options.values)?;
    let recipe = args.recipe.check(&args.options.values, &compress::with_any_share(&options)?)?;
    let device = args.device.open()?;
    OutputFolder::check(folder, Existing::Refuse, PLAN_FILE)?;
    let checkpoint = compress::view(args.dequantize.apply(args.model.open(progress)?)?, &recipe)?;
    let recipe = compress::recipe_for(&options, recipe, &checkpoint)?;
    expect_apart(folder, recipe.inputs().chain(checkpoint.roots()))?;
    let job =
        Job { memory_bytes: args.memory.bytes(), device, ..Job::new(&checkpoint, args.model.model(), &recipe, folder) };
    let opening = args.model.opening();
    let origin = Origin {
        adapter: opening.adapter.as_ref().map(|path| path.display().to_string()),
        revision: opening.revision.revision.clone(),
        dequantize: args.dequantize.dequantize,
        device: args.device.device.to_string(),
    };
    let plan = tasks::plan(&job, &origin, args.tasks).map_err(|error| compress::explained(&options, error))?;
    let output = OutputFolder::create(folder, Existing::Refuse, PLAN_FILE)?;
    output.write(PLAN_FILE, (serde_json::to_string_pretty(&plan)? + "\n").as_bytes())?;
    output.finish()?;
    match (args.json.json, quiet) {
        (true, _) => print_json(&plan),
        (false, true) => Ok(()),
        (false, false) => print(&show(&plan, folder)),
    }
}

fn show(plan: &TaskPlan, folder: &Path) -> String {
    let row = |stage: &StageRecord| {
        let tasks = &plan.tasks[stage.first..stage.first + stage.tasks];
        let indices = match stage.tasks {
            1 => stage.first.to_string(),
            n => format!("{}-{}", stage.first, stage.first + n - 1),
        };
        let most = |of: &dyn Fn(usize) -> u64| ByteSize((0..tasks.len()).map(of).max().unwrap_or(0)).to_string();
        let seconds = tasks.iter().map(|task| task.expected_seconds).fold(0.0, f64::max);
        let before: Vec<&str> = stage.waits_for.iter().map(|stage| stage.name()).collect();
        vec![
            stage.name.name().to_string(),
            indices,
            before.join(", "),
            HumanDuration(Duration::from_secs_f64(seconds)).to_string(),
            most(&|i| tasks[i].read_bytes),
            most(&|i| tasks[i].written_bytes),
        ]
    };
    let stages =
        table(&["stage", "tasks", "after", "a task takes", "reads", "writes"], plan.stages.iter().map(row).collect());
    let notes: String = plan.notes.iter().map(|note| format!("{note}\n")).collect();
    let finish = HumanDuration(Duration::from_secs_f64(plan.finish_seconds));
    let folder = folder.display();
    format!("{stages}`lrc finish` takes about {finish}\n{notes}wrote `{folder}`; next: `lrc task {folder} --index 0`\n")
}

/// The folder of a plan.
#[derive(Debug, Args)]
pub(super) struct PlannedArgs {
    /// Folder that `lrc plan` wrote
    #[arg(value_name = "PLAN")]
    plan: PathBuf,
}

impl PlannedArgs {
    pub fn folder(&self) -> &Path {
        &self.plan
    }

    /// Opens what was planned.
    pub fn open(&self, plan: &TaskPlan, progress: &Bars) -> Result<Planned> {
        let damaged = |reason: String| {
            let path = self.plan.join(PLAN_FILE);
            Failure::unsupported(format!("`{}` is damaged: {reason}", path.display()))
                .hint("plan again in another folder")
        };
        let options: RecipeOptions =
            serde_json::from_value(plan.job["recipe"].clone()).map_err(|error| damaged(error.to_string()))?;
        let recipe = Recipe::new(&options)?;
        let revision = RevisionArgs { revision: plan.revision.clone() };
        let opening = OpenArgs { adapter: plan.adapter.as_ref().map(PathBuf::from), revision };
        let dequantize = DequantizeArgs { dequantize: plan.dequantize };
        let device = DeviceArgs { device: plan.device.parse::<DeviceChoice>().map_err(damaged)? };
        let checkpoint = compress::view(dequantize.apply(opening.open(&plan.source, progress)?)?, &recipe)?;
        Ok(Planned { recipe, checkpoint, device })
    }
}

/// The inputs of a plan.
pub(super) struct Planned {
    pub recipe: Recipe,
    pub checkpoint: Checkpoint,
    pub device: DeviceArgs,
}

impl Planned {
    /// The job that was planned.
    pub fn job<'a>(&'a self, plan: &'a TaskPlan, output: &'a Path) -> Result<Job<'a>> {
        let device = self.device.open()?;
        let job = Job::new(&self.checkpoint, &plan.source, &self.recipe, output);
        Ok(Job { memory_bytes: plan.memory_bytes, device, ..job })
    }
}
