//! In every family the output computes what the source does with the dropped channels and heads at zero and the others
//! refitted.

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

/// The columns of the source's reader that the output has, found by the rows of the linear that makes them.
fn kept(source: &Checkpoint, narrow: &Checkpoint, reader: &LinearInfo) -> Vec<usize> {
    let id = reader.id.unwrap();
    let makers = MAKERS.iter().find(|(role, _)| *role == id.slot.role).unwrap().1;
    let maker = |checkpoint: &Checkpoint| {
        let linears = inventory::linears(checkpoint);
        let is_maker = |l: &&LinearInfo| l.id.is_some_and(|l| l.block == id.block && makers.contains(&l.slot.role));
        rows(checkpoint, linears.iter().find(is_maker).unwrap())
    };
    let (before, after) = (maker(source), maker(narrow));
    let own = inventory::linears(narrow).into_iter().find(|linear| linear.module == reader.module).unwrap();
    after[..own.in_features].iter().map(|row| before.iter().position(|other| other == row).unwrap()).collect()
}

/// The source, with the columns of the output's readers in their places and zeros in all others.
fn widened(source: &Checkpoint, narrow: &Checkpoint, from: &Path, to: &Path) {
    common::copy(path(from), to);
    let linears = inventory::linears(source);
    let specs: Vec<TensorSpec> = source
        .tensors()
        .map(|info| TensorSpec { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone() })
        .collect();
    let mut writer = SafetensorsWriter::create(to, &specs, u64::MAX).unwrap();
    for spec in &specs {
        let reader = linears.iter().find(|linear| {
            let is_reader = linear.id.is_some_and(|id| MAKERS.iter().any(|(role, _)| *role == id.slot.role));
            linear.weight_name() == spec.name && is_reader
        });
        let mut values = source.values(&spec.name);
        if let Some(reader) = reader.filter(|reader| narrow.info(&reader.weight_name()).unwrap().shape != spec.shape) {
            let own = inventory::linears(narrow).into_iter().find(|linear| linear.module == reader.module).unwrap();
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
            Err(_) => writer.write(&spec.name, &source.with_bytes(&spec.name, <[u8]>::to_vec).unwrap()).unwrap(),
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
            let run = lrc(&model.arguments(&out, &["--keep", "0.9", "--exclude", "*att*"]));
            assert!(run.code == 4 && run.stderr.contains("nothing can become narrower"), "{family}: {}", run.stderr);
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
