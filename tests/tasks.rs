//! Compressions that several processes make, task by task: the bytes of one run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::budgets::fixture_in_bf16;
use crate::common::{FIXTURE, TRAIN, command, copy, finish, lrc, ok, path};
use crate::resume::{content, difference};
use serde_json::Value;

/// A recipe with eight batches of windows; the gradients of some are taken.
fn calibrated(text: &str) -> [&str; 8] {
    ["--keep", "0.8", "--calibration", text, "--samples", "30", "--gradient-samples", "11"]
}

/// The beginning of the training text, which is read by every task.
fn short_text(folder: &Path) -> String {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(TRAIN)).unwrap();
    let place = folder.join("short.txt");
    std::fs::write(&place, &text[..text.floor_char_boundary(16_000)]).unwrap();
    path(&place).into()
}

/// A plan in a folder of its own.
struct Planned {
    folder: tempfile::TempDir,
    plan: Value,
}

impl Planned {
    fn new(model: &str, recipe: &[&str], n_tasks: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("plan");
        let arguments = ["plan", model, "-o", path(&place), "--tasks", &n_tasks.to_string(), "--json"];
        let plan = ok(&[&arguments[..], recipe].concat()).json();
        assert_eq!(plan, serde_json::from_slice::<Value>(&std::fs::read(place.join("plan.json")).unwrap()).unwrap());
        Self { folder, plan }
    }

    fn place(&self) -> PathBuf {
        self.folder.path().join("plan")
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn n_tasks(&self) -> usize {
        self.plan["tasks"].as_array().unwrap().len()
    }

    /// The indices of each stage.
    fn stages(&self) -> Vec<Vec<usize>> {
        let number = |value: &Value| value.as_u64().unwrap() as usize;
        let stages = self.plan["stages"].as_array().unwrap().iter();
        stages
            .map(|stage| (number(&stage["first"])..number(&stage["first"]) + number(&stage["tasks"])).collect())
            .collect()
    }

    fn task(&self, index: usize) -> Command {
        let mut command = command(&["task", path(&self.place()), "--index", &index.to_string(), "-q"]);
        command.stderr(Stdio::piped()).stdout(Stdio::piped());
        command
    }

    fn finish(&self) -> Command {
        command(&["finish", path(&self.place()), "-o", path(&self.out()), "-q"])
    }

    /// Runs all tasks, of each stage from its last to its first and `at_once` side by side, and finishes.
    fn run(&self, at_once: usize) {
        for mut stage in self.stages() {
            stage.reverse();
            for some in stage.chunks(at_once) {
                let running: Vec<_> = some.iter().map(|&index| self.task(index).spawn().unwrap()).collect();
                for child in running {
                    let ended = child.wait_with_output().unwrap();
                    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
                }
            }
        }
        let run = finish(&mut self.finish());
        assert_eq!(run.code, 0, "{}", run.stderr);
    }

    /// Checks that the output is that of one run.
    fn expect(&self, whole: &Path) {
        let (found, expected) = (content(&self.out()), content(whole));
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (name, bytes) in &found {
            let differs = || format!("`{}` differs{}", name.display(), difference(bytes, &expected[name]));
            assert!(bytes == &expected[name], "{}", differs());
        }
    }
}

/// The output of `lrc compress`.
fn whole(folder: &Path, model: &str, recipe: &[&str]) -> PathBuf {
    let out = folder.join("whole");
    ok(&[&["compress", model, "-o", path(&out), "-q"][..], recipe].concat());
    out
}

#[test]
fn any_number_of_tasks_makes_the_bytes_of_one_run() {
    let folder = tempfile::tempdir().unwrap();
    let text = short_text(folder.path());
    let recipe = calibrated(&text);
    let whole = whole(folder.path(), FIXTURE, &recipe);
    for (n_tasks, at_once, stages) in [(1, 1, &[1, 1, 1][..]), (4, 2, &[4, 4, 4]), (7, 4, &[7, 4, 4])] {
        let planned = Planned::new(FIXTURE, &recipe, n_tasks);
        let found: Vec<usize> = planned.stages().iter().map(Vec::len).collect();
        assert_eq!(found, stages);
        planned.run(at_once);
        planned.expect(&whole);
    }
}

/// What the stages of other recipes are, and what is left to the end.
#[test]
fn every_kind_of_recipe_is_cut_where_it_can_be() {
    const MEASURED: [&str; 3] = ["walk", "statistics", "fits"];
    let recipes: [(&[&str], &[&str], &str); 5] = [
        (&["--keep", "0.7"], &["fits"], "[]"),
        (&["--keep", "0.8", "--method", "svd-llm", "--sequential"], &MEASURED, "sequential mode"),
        (&["--quant", "gptq-int4-g32", "--compensate", "kfac", "--compensate-rank", "4"], &MEASURED, "equal-bytes"),
        (&["--target-size", "900kB", "--share"], &MEASURED, "[]"),
        (&["--structure", "narrow", "--keep", "0.8"], &["walk", "statistics"], "orders channels"),
    ];
    for (i, (recipe, stages, note)) in recipes.into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let text = short_text(folder.path());
        let calibrated = [recipe, &["--calibration", &text, "--samples", "8"]].concat();
        let recipe = if i == 0 { recipe } else { &calibrated };
        let planned = Planned::new(FIXTURE, recipe, 2);
        let named: Vec<&Value> =
            planned.plan["stages"].as_array().unwrap().iter().map(|stage| &stage["name"]).collect();
        assert_eq!(named, stages, "{recipe:?}");
        let said = planned.plan["notes"].to_string();
        assert!(said.contains(note), "{recipe:?}: {said}");
        planned.run(2);
        planned.expect(&whole(folder.path(), FIXTURE, recipe));
    }
}

/// Values in 16 bits are rounded with feedback, in the metric of Grams that other tasks measured.
#[test]
fn factors_are_rounded_by_tasks() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("bf16");
    fixture_in_bf16(&model);
    let short = short_text(folder.path());
    let text = ["--calibration", &short, "--samples", "8"];
    for (i, recipe) in
        [&["--keep", "0.8", "--elastic"][..], &["--target-size", "450kB", "--share"]].into_iter().enumerate()
    {
        let recipe = [recipe, &text].concat();
        let planned = Planned::new(path(&model), &recipe, 3);
        let last = &planned.plan["stages"][3];
        assert!(last["name"] == "round" && last["waits_for"] == serde_json::json!(["statistics", "fits"]), "{last}");
        planned.run(2);
        // Nothing is left to round.
        let rounded = (0..planned.n_tasks()).map(|index| planned.place().join(format!("task-{index:04}")));
        let files = rounded.flat_map(|folder| std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name()));
        assert!(files.filter(|name| name.to_string_lossy().starts_with("laid-")).count() > 20);
        planned.expect(&whole(&folder.path().join(i.to_string()), path(&model), &recipe));
    }
}

/// Experts that see few tokens have the mean metric of other experts and blocks, which other tasks measured.
#[test]
fn metrics_of_experts_come_from_all_tasks() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("experts"), folder.path().join("text.txt"));
    copy("fixtures/pico/mixtral", &model);
    std::fs::copy("fixtures/pico/tokenizer.json", model.join("tokenizer.json")).unwrap();
    std::fs::write(&text, "once upon a time there was a little dog. it liked to run! ".repeat(20)).unwrap();
    let recipe = ["--keep", "0.7", "--calibration", path(&text), "--seq-len", "12", "--samples", "3"];
    let whole = whole(folder.path(), path(&model), &recipe);
    let report = std::fs::read_to_string(whole.join("lrc-report.json")).unwrap();
    assert!(report.contains("data-free metric"), "some expert sees too few tokens");
    let planned = Planned::new(path(&model), &recipe, 3);
    planned.run(3);
    planned.expect(&whole);
}

#[test]
fn tasks_that_are_killed_missing_or_run_twice() {
    let folder = tempfile::tempdir().unwrap();
    let text = short_text(folder.path());
    let planned = Planned::new(FIXTURE, &calibrated(&text), 2);
    let refused = |run: &mut Command, code: i32, expected: &str| {
        let run = finish(run);
        assert!(run.code == code && run.stderr.contains(expected), "{}: {}", run.code, run.stderr);
    };
    refused(&mut planned.task(2), 6, "task 2 of stage `statistics` waits for 2 tasks that are not finished: 0-1");
    refused(&mut planned.finish(), 6, "waits for 4 tasks that are not finished: 2-5");
    refused(&mut planned.task(6), 2, "`--index 6` is no task");
    refused(&mut command(&["task", path(folder.path()), "--index", "0"]), 2, "has no plan");
    let place = planned.place();
    let again = ["plan", FIXTURE, "-o", path(&place), "--tasks", "2", "--keep", "0.8"];
    refused(&mut command(&again), 2, "has a plan already");
    // Each task is killed after its first new piece, twice.
    let mut n_kills = 0;
    for index in 0..planned.n_tasks() {
        let partial = planned.place().join(format!("task-{index:04}.partial"));
        let n_pieces = || std::fs::read_dir(partial.join("pieces")).map_or(0, |found| found.count());
        for _ in 0..2 {
            let (before, mut child) = (n_pieces(), planned.task(index).spawn().unwrap());
            while n_pieces() <= before && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            child.kill().unwrap();
            n_kills += usize::from(!child.wait().unwrap().success());
        }
        assert_eq!(finish(&mut planned.task(index)).code, 0);
        assert!(!partial.exists());
    }
    assert!(n_kills >= planned.n_tasks(), "{n_kills} kills");
    // A second run of a finished task changes nothing.
    let record = planned.place().join("task-0003/task.json");
    let before = std::fs::read(&record).unwrap();
    assert_eq!(finish(&mut planned.task(3)).code, 0);
    assert_eq!(std::fs::read(&record).unwrap(), before);
    // The first stage is not read at the end.
    std::fs::remove_dir_all(planned.place().join("task-0000")).unwrap();
    assert_eq!(finish(&mut planned.finish()).code, 0);
    planned.expect(&whole(folder.path(), FIXTURE, &calibrated(&text)));
}

#[test]
fn another_source_text_or_recipe_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    copy(FIXTURE, &model);
    std::fs::rename(short_text(folder.path()), &text).unwrap();
    let planned = Planned::new(path(&model), &["--keep", "0.8", "--calibration", path(&text), "--samples", "4"], 1);
    let refused = |run: &mut Command, expected: &str| {
        let run = finish(run);
        assert!(run.code == 4 && run.stderr.contains(expected), "{}: {}", run.code, run.stderr);
    };
    let changed = |file: &Path, run: &mut Command, expected: &str| {
        let before = std::fs::read(file).unwrap();
        let mut bytes = before.clone();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(file, bytes).unwrap();
        refused(run, expected);
        std::fs::write(file, before).unwrap();
    };
    changed(&model.join("model.safetensors"), &mut planned.task(0), "`source_files.model.safetensors` was");
    changed(&text, &mut planned.task(0), "`calibration.text_sha256` was");
    assert_eq!(finish(&mut planned.task(0)).code, 0);
    // A plan that was edited is not the plan of its tasks.
    let file = planned.place().join("plan.json");
    let plan = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, plan.replace("\"keep\": 0.8", "\"keep\": 0.7")).unwrap();
    refused(&mut planned.task(1), "`recipe.keep` was 0.7, is 0.8");
    std::fs::write(&file, plan.replace("\"lrc_version\": \"", "\"lrc_version\": \"9")).unwrap();
    refused(&mut planned.task(1), "is not a plan of this version");
    std::fs::write(&file, &plan).unwrap();
    (1..3).for_each(|index| assert_eq!(finish(&mut planned.task(index)).code, 0));
    changed(&model.join("model.safetensors"), &mut planned.finish(), "`source_files.model.safetensors` was");
    // A torn piece is named with its task, and nothing is written.
    let piece = planned.place().join("task-0001/forward-2");
    let bytes = std::fs::read(&piece).unwrap();
    std::fs::write(&piece, &bytes[..bytes.len() - 1]).unwrap();
    refused(&mut planned.finish(), "task-0001/forward-2` is damaged: remove `");
    assert!(!planned.out().exists());
    let dense = lrc(&["plan", path(&model), "-o", path(&folder.path().join("dense")), "--keep", "1", "--tasks", "2"]);
    assert!(dense.code == 2 && dense.stderr.contains("nothing of this run can be cut"), "{}", dense.stderr);
}
