//! In every family the output computes what the source does with the dropped channels and heads at zero and the others
//! refitted.

use std::collections::BTreeSet;
use std::path::Path;

use crate::common::{self, lrc, ok, path};
use crate::families::{distance, expected, families, logits, tokenizer};
use lrc::checkpoint::{Checkpoint, SafetensorsWriter, TensorSpec, cast};
use lrc::linalg::transpose_row_major;
use lrc::model::inventory::{self, LinearInfo};
use lrc::model::{Order, Role, open};
use serde_json::Value;

use super::{Model, config, report, widths};

/// The linears of a block that make what a reader reads; the first rows of each belong to its columns, in order.
const MAKERS: [(Role, &[Role]); 2] =
    [(Role::DownProj, &[Role::UpProj, Role::GateUpProj]), (Role::OProj, &[Role::QProj, Role::QkvProj])];

/// The rows of a matrix (m, n).
fn rows(checkpoint: &Checkpoint, linear: &LinearInfo) -> Vec<Vec<f32>> {
    let values = inventory::weight(checkpoint, linear).unwrap();
    values.chunks(linear.in_features).map(<[f32]>::to_vec).collect()
}

/// The name that a tensor of the source has in the output, whose experts are found by the rows of their routers; `None` if
/// its expert was left out.
fn name_in_output(source: &Checkpoint, narrow: &Checkpoint, name: &str) -> Option<String> {
    let Some((start, rest)) = name.split_once(".experts.") else { return Some(name.into()) };
    let (expert, rest) = rest.split_once('.').unwrap();
    let router = format!("{start}.gate.weight");
    let rows = |checkpoint: &Checkpoint| {
        let columns = checkpoint.require(&router).unwrap().shape[1];
        checkpoint.values(&router).unwrap().chunks(columns).map(<[f32]>::to_vec).collect::<Vec<_>>()
    };
    let own = &rows(source)[expert.parse::<usize>().unwrap()];
    let at = rows(narrow).iter().position(|row| row == own)?;
    Some(format!("{start}.experts.{at}.{rest}"))
}

/// The linear of the output for one of the source.
fn in_output(source: &Checkpoint, narrow: &Checkpoint, linear: &LinearInfo) -> LinearInfo {
    let name = name_in_output(source, narrow, &linear.weight_name()).unwrap();
    inventory::linears(narrow).into_iter().find(|own| own.weight_name() == name).unwrap()
}

/// The columns of the source's reader that the output has, found by the rows of the linear that makes them.
fn kept(source: &Checkpoint, narrow: &Checkpoint, reader: &LinearInfo) -> Vec<usize> {
    let id = reader.id.unwrap();
    let makers = MAKERS.iter().find(|(role, _)| *role == id.slot.role).unwrap().1;
    let linears = inventory::linears(source);
    let is_maker = |l: &&LinearInfo| {
        l.id.is_some_and(|l| l.block == id.block && makers.contains(&l.slot.role) && l.slot.expert == id.slot.expert)
    };
    let maker = linears.iter().find(is_maker).unwrap();
    let (before, after) = (rows(source, maker), rows(narrow, &in_output(source, narrow, maker)));
    let own = in_output(source, narrow, reader);
    after[..own.in_features].iter().map(|row| before.iter().position(|other| other == row).unwrap()).collect()
}

/// The source without the experts that the output does not have, with the columns of the output's readers in their places
/// and zeros in all others.
fn widened(source: &Checkpoint, narrow: &Checkpoint, from: &Path, to: &Path) {
    common::copy(path(from), to);
    std::fs::remove_file(to.join("model.safetensors")).unwrap();
    let (mut of_source, of_output) = (config(from), config(narrow.root()));
    if let Some(number) = of_output.get("num_local_experts") {
        of_source["num_local_experts"] = number.clone();
        std::fs::write(to.join("config.json"), of_source.to_string()).unwrap();
    }
    let linears = inventory::linears(source);
    let named = source.tensors().filter_map(|info| Some((info, name_in_output(source, narrow, &info.name)?)));
    let named: Vec<(&str, TensorSpec)> = named
        .map(|(info, name)| {
            let rows = narrow.require(&name).unwrap().shape[0];
            let shape = if name.ends_with(".gate.weight") { vec![rows, info.shape[1]] } else { info.shape.clone() };
            (info.name.as_str(), TensorSpec { name, dtype: info.dtype, shape })
        })
        .collect();
    let specs: Vec<TensorSpec> = named.iter().map(|(_, spec)| spec.clone()).collect();
    let mut writer = SafetensorsWriter::create(to, &specs, u64::MAX).unwrap();
    for (name, spec) in &named {
        let reader = linears.iter().find(|linear| {
            let is_reader = linear.id.is_some_and(|id| MAKERS.iter().any(|(role, _)| *role == id.slot.role));
            linear.weight_name() == *name && is_reader
        });
        let mut values = if name.ends_with(".gate.weight") { narrow.values(name) } else { source.values(name) };
        if let Some(reader) = reader.filter(|_| narrow.info(&spec.name).unwrap().shape != spec.shape) {
            let own = in_output(source, narrow, reader);
            let refitted = rows(narrow, &own);
            let (m, n) = reader.shape();
            let mut wide = vec![0.0; m * n];
            for (at, column) in kept(source, narrow, reader).into_iter().enumerate() {
                (0..m).for_each(|i| wide[i * n + column] = refitted[i][at]);
            }
            values = Ok(if reader.order == Order::InOut { transpose_row_major(&wide, m, n) } else { wide });
        }
        match values {
            Ok(values) => writer.write(&spec.name, &cast::encode(spec.dtype, &values).unwrap()).unwrap(),
            Err(_) => writer.write(&spec.name, &source.with_bytes(name, <[u8]>::to_vec).unwrap()).unwrap(),
        }
    }
    writer.finish().unwrap();
}

/// Fields of configs with the numbers of channels and of heads of keys and values.
fn of_config(config: &Value) -> [Option<u64>; 2] {
    let fields = config.get("text_config").unwrap_or(config);
    let first = |names: &[&str]| names.iter().find_map(|name| fields.get(name)?.as_u64());
    [first(&["intermediate_size", "n_inner", "ffn_dim", "hidden_dim"]), first(&["num_key_value_heads"])]
}

/// Compares an output with the source whose dropped channels and heads are at zero.
pub(super) fn check(family: &str, model: &Model, out: &Path) {
    let [source, narrow] = [&model.model, out].map(|folder| open(folder).unwrap());
    let wide = model.folder.path().join(format!("wide-{}", out.file_name().unwrap().to_string_lossy()));
    widened(&source, &narrow, &model.model, &wide);
    let (_, ids) = expected(family);
    let [found, zeroed, dense] = [out, &wide, &model.model].map(|model| logits(model, &ids).unwrap());
    assert!(distance(&found, &zeroed) < 1e-5, "{family}: {}", distance(&found, &zeroed));
    assert!(distance(&zeroed, &dense) > 1e-3, "{family}: the oracle depends on what was dropped");
}

#[test]
fn the_output_is_the_source_with_dropped_channels_at_zero() {
    for family in families() {
        let model = Model::pico(family, &tokenizer(family));
        let out = model.folder.path().join("out");
        if ["mixtral", "qwen3_moe"].contains(&family) {
            continue;
        }
        ok(&model.arguments(&out, &["--keep", "0.7", "--width-multiple", "3"]));
        check(family, &model, &out);
        let channels = widths(&report(&out), "channels");
        assert!(channels.windows(2).all(|pair| pair[0] == pair[1]) && channels[0][1].is_multiple_of(3), "{family}");
        assert!(channels[0][1] < channels[0][0], "{family}");
        assert_eq!(of_config(&config(&out))[0], Some(channels[0][1]), "{family}");
    }
}

/// The experts of a report: how many stay, of how many, in every block, and the channels that those have, and had.
fn experts(report: &Value) -> ([u64; 2], [u64; 2]) {
    let all = widths(report, "experts");
    let units = report["narrow"]["blocks"].as_array().unwrap().iter().filter(|unit| unit["kind"] == "experts");
    let n_blocks = units.map(|unit| unit["block"].as_u64().unwrap()).collect::<BTreeSet<u64>>().len();
    let stay: Vec<[u64; 2]> = all.iter().filter(|unit| unit[1] > 0).copied().collect();
    assert!(stay.iter().all(|unit| *unit == stay[0]), "{stay:?}");
    ([stay.len(), all.len()].map(|n| (n / n_blocks) as u64), [stay[0][1], stay[0][0]])
}

#[test]
fn the_output_is_the_source_without_some_experts_and_channels_of_others() {
    for (family, list, active) in [("mixtral", "block_sparse_moe", 2), ("qwen3_moe", "mlp", 3)] {
        let model = Model::pico(family, &tokenizer(family));
        let mut found = Vec::new();
        for keep in ["0.95", "0.7", "0.5"] {
            let out = model.folder.path().join(keep);
            ok(&model.arguments(&out, &["--keep", keep, "--width-multiple", "4", "--exclude", "*att*"]));
            check(family, &model, &out);
            let (report, config) = (report(&out), config(&out));
            let ([n, all], [width, whole]) = experts(&report);
            assert!((active..=all).contains(&n) && width.is_multiple_of(4) && width <= whole, "{family}");
            assert_eq!(config["num_local_experts"].as_u64().unwrap(), n, "{family}");
            let field = if family == "mixtral" { "intermediate_size" } else { "moe_intermediate_size" };
            assert_eq!(config[field].as_u64(), Some(width), "{family}");
            assert!(
                config.get("per_layer_config").is_none()
                    && report["sizes"]["keep"].as_f64().unwrap() <= keep.parse().unwrap()
            );
            let names =
                open(&out).unwrap().tensors().filter(|t| t.name.contains(&format!("1.{list}.experts."))).count();
            assert_eq!(names as u64, 3 * n, "{family}");
            found.push((n, width));
        }
        assert!(found.windows(2).all(|pair| pair[1].0 * pair[1].1 < pair[0].0 * pair[0].1), "{family}: {found:?}");
    }
}

#[test]
fn the_expert_that_adds_least_goes_first() {
    let model = Model::pico("mixtral", &tokenizer("mixtral"));
    let file = model.model.join("model.safetensors");
    let source = open(&model.model).unwrap();
    let quiet = |name: &str| {
        ["0.block_sparse_moe.experts.1.w2", "1.block_sparse_moe.experts.3.w2"].iter().any(|e| name.contains(e))
    };
    let specs: Vec<TensorSpec> =
        source.tensors().map(|i| TensorSpec { name: i.name.clone(), dtype: i.dtype, shape: i.shape.clone() }).collect();
    let tensors: Vec<Vec<f32>> = specs
        .iter()
        .map(|spec| {
            source.values(&spec.name).unwrap().iter().map(|v| if quiet(&spec.name) { 1e-3 * v } else { *v }).collect()
        })
        .collect();
    drop(source);
    std::fs::remove_file(&file).unwrap();
    let mut writer = SafetensorsWriter::create(&model.model, &specs, u64::MAX).unwrap();
    for (spec, values) in specs.iter().zip(tensors) {
        writer.write(&spec.name, &cast::encode(spec.dtype, &values).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    let out = model.narrow("out", &["--keep", "0.75", "--exclude", "*att*", "--width-multiple", "24"]);
    let units = report(&out)["narrow"]["blocks"].as_array().unwrap().clone();
    let dropped = units.iter().filter(|unit| unit["after"] == 0);
    let dropped: Vec<[u64; 2]> =
        dropped.map(|unit| ["block", "expert"].map(|key| unit[key].as_u64().unwrap())).collect();
    assert_eq!(dropped, [[0, 1], [1, 3]]);
    let run = ok(&[
        &["inspect", path(&model.model), "--json", "--importance", "-q", "--calibration", path(&model.text)][..],
        &["--samples", "4", "--seq-len", "24"],
    ]
    .concat());
    let found: Value = serde_json::from_str(&run.stdout).unwrap();
    let of_inspect = |block: u64, expert: u64| {
        let all = found["importance"]["experts"].as_array().unwrap();
        all.iter().find(|e| e["block"] == block && e["expert"] == expert).unwrap()["squared_error"].as_f64().unwrap()
    };
    for unit in units.iter().filter(|unit| unit["after"] == 0) {
        let (a, b) = (
            unit["squared_error"].as_f64().unwrap(),
            of_inspect(unit["block"].as_u64().unwrap(), unit["expert"].as_u64().unwrap()),
        );
        assert!((a - b).abs() <= 1e-6 * a.max(b), "{a} {b}");
    }
}

#[test]
fn the_output_is_the_source_with_dropped_heads_at_zero_or_they_are_refused() {
    let run = |family: &str| {
        let model = Model::pico(family, &tokenizer(family));
        let out = model.folder.path().join("out");
        let run = lrc(&model.arguments(&out, &["--keep", "0.6", "--exclude", "*mlp*"]));
        (model, out, run)
    };
    let llamas = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "qwen3_moe"];
    for family in llamas.into_iter().chain(["gemma3", "llava", "qwen2_5_vl", "smolvlm"]) {
        let (model, out, run) = run(family);
        assert_eq!(run.code, 0, "{family}: {}", run.stderr);
        check(family, &model, &out);
        let groups = widths(&report(&out), "groups");
        assert!(groups.iter().all(|pair| *pair == [2, 1]), "{family}: {groups:?}");
        assert_eq!(of_config(&config(&out))[1], Some(1), "{family}");
    }
    for family in ["gpt2", "gpt_neox", "olmo2"] {
        let (_, _, run) = run(family);
        let refused = run.stderr.contains("groups stay as they are: the family") && run.stderr.contains("hint: ");
        assert!(run.code == 4 && refused, "{family}: {}", run.stderr);
    }
}

#[test]
fn biases_of_dropped_channels_go_with_them() {
    let model = Model::pico("gpt2", &tokenizer("gpt2"));
    let out = model.narrow("out", &["--keep", "0.7", "--width-multiple", "1"]);
    let [before, after] = [&model.model, &out].map(|folder| open(folder).unwrap());
    let name = "transformer.h.0.mlp.c_fc";
    let find = |checkpoint: &Checkpoint| {
        let linear = inventory::linears(checkpoint).into_iter().find(|linear| linear.module == name).unwrap();
        (rows(checkpoint, &linear), checkpoint.values(&format!("{name}.bias")).unwrap())
    };
    let ((rows_before, biases_before), (rows_after, biases_after)) = (find(&before), find(&after));
    assert!(rows_after.len() < rows_before.len() && rows_after.len() == biases_after.len());
    for (row, bias) in rows_after.iter().zip(biases_after) {
        let at = rows_before.iter().position(|other| other == row).unwrap();
        assert_eq!(bias, biases_before[at]);
    }
}
