//! Every format stores the same model, in the layout that its documentation describes.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use crate::common::{FIXTURE, HELD_OUT, lrc, ok, path};
use candle_core::Device;
use candle_core::quantized::gguf_file::Content;
use half::f16;
use lrc::checkpoint::Checkpoint;
use serde_json::Value;

use super::{LORC, MODULE, compress, ppl};

/// The tensors of a safetensors file as stored, without the project's own decoding.
struct Raw {
    bytes: Vec<u8>,
}

impl Raw {
    fn open(path: &Path) -> Self {
        Self { bytes: std::fs::read(path).unwrap() }
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        safetensors::SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).unwrap().shape().to_vec()
    }

    fn data(&self, name: &str) -> Vec<u8> {
        safetensors::SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn words(&self, name: &str) -> Vec<u32> {
        self.data(name).chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.data(name).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn halves(&self, name: &str) -> Vec<f32> {
        self.data(name).chunks(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
    }
}

/// The down projection of block 1 as `lrc` multiplies it out.
fn multiplied_out(folder: &Path, model: &Path) -> Vec<f32> {
    let out = folder.join(format!("{}-dense", model.file_name().unwrap().to_str().unwrap()));
    ok(&["export", path(model), "--format", "dense", "-o", path(&out), "-q"]);
    Checkpoint::open(&out).unwrap().values(&format!("{MODULE}.weight")).unwrap()
}

/// Unpacks by the formats' own documentation, with one loop per code.
#[test]
fn exchange_formats_hold_what_their_documents_say() {
    let folder = tempfile::tempdir().unwrap();
    for (bits, group, quant) in [(4usize, 32usize, "rtn-int4-g32"), (8, 256, "rtn-int8-channel")] {
        let name = |part: &str| format!("{MODULE}.{part}");
        let out = folder.path().join(format!("ct{bits}"));
        compress(&out, &["--quant", quant, "--format", "compressed-tensors"]);
        let raw = Raw::open(&out.join("model.safetensors"));
        let (packed, scales) = (raw.words(&name("weight_packed")), raw.floats(&name("weight_scale")));
        let [rows, words] = raw.shape(&name("weight_packed"))[..] else { panic!("a matrix") };
        let cols = words * 32 / bits;
        assert_eq!(raw.words(&name("weight_shape")), [rows as u32, 0, cols as u32, 0]);
        let middle = 1i64 << (bits - 1);
        let code = |word: u32, at: usize| i64::from(word >> (at * bits)) & ((1 << bits) - 1);
        let per_word = 32 / bits;
        let expected = multiplied_out(folder.path(), &out);
        for i in 0..rows {
            for j in 0..cols {
                let q = code(packed[i * words + j / per_word], j % per_word) - middle;
                let scale = scales[i * (cols / group) + j / group];
                assert_eq!(q as f32 * scale, expected[i * cols + j]);
            }
        }

        let out = folder.path().join(format!("gptq{bits}"));
        compress(&out, &["--quant", quant, "--format", "gptq"]);
        let raw = Raw::open(&out.join("model.safetensors"));
        let (packed, zeros) = (raw.words(&name("qweight")), raw.words(&name("qzeros")));
        let (scales, places) = (raw.halves(&name("scales")), raw.words(&name("g_idx")));
        assert_eq!(raw.shape(&name("qweight")), [cols / per_word, rows]);
        assert_eq!(raw.shape(&name("qzeros")), [cols / group, rows / per_word]);
        for i in 0..rows {
            for j in 0..cols {
                assert_eq!(places[j] as usize, j / group);
                let q = code(packed[j / per_word * rows + i], j % per_word);
                let zero = code(zeros[j / group * (rows / per_word) + i / per_word], i % per_word) + 1;
                assert_eq!((q - zero) as f32 * scales[j / group * rows + i], expected[i * cols + j]);
            }
        }
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["quantization_config"]["group_size"], if group == 256 { -1 } else { 32 });
    }
}

#[test]
fn gguf_files_hold_what_candle_reads_in_them() {
    let folder = tempfile::tempdir().unwrap();
    for (quant, extra) in [("rtn-int3-g32", LORC), ("q8_0", &[]), ("q6_k", &[])] {
        let out = folder.path().join(quant);
        compress(&out, &[&["--quant", quant, "--format", "gguf"], extra].concat());
        let read = |file: &str, name: &str| -> (Vec<f32>, Vec<usize>) {
            let mut file = Cursor::new(std::fs::read(out.join(file)).unwrap());
            let content = Content::read(&mut file).unwrap();
            let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
            (tensor.flatten_all().unwrap().to_vec1().unwrap(), tensor.dims().to_vec())
        };
        let dense = folder.path().join(format!("{quant}-dense"));
        ok(&["export", path(&out), "--format", "dense", "-o", path(&dense), "-q"]);
        let dense = Checkpoint::open(&dense).unwrap();
        // Rows of q and k alternate between the two halves of a head; 6 heads of 16.
        let place = |i: usize| i / 16 * 16 + (i % 2) * 8 + i % 16 / 2;
        for (theirs, ours, is_transposed) in [
            ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight", false),
            ("blk.2.attn_q.weight", "model.layers.2.self_attn.q_proj.weight", true),
        ] {
            let (mut values, shape) = read("model.gguf", theirs);
            if !extra.is_empty() {
                let ((a, _), (b, dims)) = (
                    read("model-lora.gguf", &format!("{theirs}.lora_a")),
                    read("model-lora.gguf", &format!("{theirs}.lora_b")),
                );
                let rank = dims[1];
                for (i, row) in values.chunks_mut(shape[1]).enumerate() {
                    for (j, value) in row.iter_mut().enumerate() {
                        *value += (0..rank).map(|r| b[i * rank + r] * a[r * shape[1] + j]).sum::<f32>();
                    }
                }
            }
            let expected = dense.values(ours).unwrap();
            for (i, row) in values.chunks(shape[1]).enumerate() {
                let from = if is_transposed { place(i) } else { i };
                for (x, y) in row.iter().zip(&expected[from * shape[1]..]) {
                    assert!((x - y).abs() < 1e-5, "{quant} {theirs}: {x} {y}");
                }
            }
        }
    }
}

#[test]
fn adapters_are_what_peft_expects() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    compress(
        &out,
        &[&["--quant", "rtn-int2,rtn-int4", "--compensate", "lorc", "--bits", "5", "--format", "peft"][..]].concat(),
    );
    let config: Value =
        serde_json::from_slice(&std::fs::read(out.join("adapter/adapter_config.json")).unwrap()).unwrap();
    let raw = Raw::open(&out.join("adapter/adapter_model.safetensors"));
    let ranks = config["rank_pattern"].as_object().unwrap();
    assert!(!ranks.is_empty() && config["alpha_pattern"] == config["rank_pattern"]);
    for (module, rank) in ranks {
        let rank = rank.as_u64().unwrap() as usize;
        assert_eq!(raw.shape(&format!("base_model.model.{module}.lora_A.weight"))[0], rank);
        assert_eq!(raw.shape(&format!("base_model.model.{module}.lora_B.weight"))[1], rank);
    }
    let largest = ranks.values().filter_map(Value::as_u64).max();
    assert_eq!((config["r"].as_u64(), config["lora_alpha"].as_u64()), (largest, largest));
    // The adapter alone is not a model; its base is, and includes the adapter.
    let run = lrc(&["eval", path(&out.join("adapter")), "--text", HELD_OUT]);
    assert!(run.code == 4 && run.stderr.contains("give the folder of its base"), "{}", run.stderr);
}

/// The base below an adapter is stored as its family stores the weight, (in, out) in GPT-2; `factored` has every base
/// as (out, in).
#[test]
fn bases_below_adapters_are_turned_once() {
    let folder = tempfile::tempdir().unwrap();
    let [adapter, factored, direct, through] =
        ["adapter", "factored", "direct", "through"].map(|name| folder.path().join(name));
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/pico/gpt2");
    let lorc = ["--quant", "rtn-int4-g8", "--compensate", "lorc", "--compensate-rank", "2", "--format", "peft"];
    ok(&[&["compress", path(&model), "-o", path(&adapter)], &lorc[..]].concat());
    for (from, format, to) in
        [(&adapter, "dense", &direct), (&adapter, "factored", &factored), (&factored, "dense", &through)]
    {
        ok(&["export", path(from), "--format", format, "-o", path(to)]);
    }
    let [direct, through] = [&direct, &through].map(|folder| Checkpoint::open(folder).unwrap());
    let shape = |folder: &Checkpoint| folder.info("transformer.h.0.attn.c_attn.weight").unwrap().shape.clone();
    assert_eq!(shape(&direct), shape(&Checkpoint::open(&model).unwrap()));
    for info in direct.tensors() {
        let [once, twice] = [&direct, &through].map(|checkpoint| checkpoint.values(&info.name).unwrap());
        let furthest = once.iter().zip(twice).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(furthest < 1e-6, "{}: {furthest}", info.name);
    }
}

/// One compression in every format, and every format from every other: the same model.
#[test]
fn every_format_is_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let formats = ["factored", "dense", "compressed-tensors", "gptq", "peft", "gguf"];
    let flags = [&["--quant", "rtn-int4-g32", "--exclude", "*.0.self_attn.k_proj"], LORC].concat();
    let at = |name: &str| -> PathBuf { folder.path().join(name) };
    let mut expected = None;
    for format in formats {
        let report = compress(&at(format), &[&flags[..], &["--format", format]].concat());
        let found = ppl(&at(format));
        let expected = *expected.get_or_insert(found);
        assert!((found / expected - 1.0).abs() < 1e-6, "{format}: {found} {expected}");
        // The size includes headers.
        let files = ["model.safetensors", "model.gguf", "model-lora.gguf", "adapter/adapter_model.safetensors"];
        let bytes: u64 = files.iter().filter_map(|file| at(format).join(file).metadata().ok()).map(|m| m.len()).sum();
        assert_eq!(report["sizes"]["file_bytes_after"], bytes, "{format}");
        let inspected = ok(&["inspect", path(&at(format)), "--json", "-q"]).json();
        assert_eq!(inspected["linears"].as_array().unwrap().len(), 28, "{format}");
    }
    for from in formats {
        for to in formats {
            let out = at("exported");
            let run = lrc(&["export", path(&at(from)), "--format", to, "-o", path(&out), "--force", "-q"]);
            // A dense base has lost its codes, and a dense output has no codes that could be refused.
            if from == "peft" && matches!(to, "compressed-tensors" | "gptq") {
                assert!(run.code == 4 && run.stderr.contains("not quantized in groups"), "{}", run.stderr);
                continue;
            }
            assert_eq!(run.code, 0, "{from} to {to}: {}", run.stderr);
            assert!((ppl(&out) / expected.unwrap() - 1.0).abs() < 1e-6, "{from} to {to}");
            if from != "dense" && from != "peft" && !matches!(to, "dense" | "peft") {
                for file in ["model.safetensors", "model.gguf"] {
                    let read = |folder: PathBuf| std::fs::read(folder.join(file)).ok();
                    // Scales are f16 values in every format, so nothing is rounded on the way.
                    assert!(read(out.clone()) == read(at(to)), "{from} to {to}: {file} differs");
                }
            }
        }
    }
    // An exported config equals that of the source.
    let config = |folder: &str| std::fs::read_to_string(Path::new(folder).join("config.json")).unwrap();
    ok(&["export", path(&at("factored")), "--format", "dense", "-o", path(&at("native")), "-q"]);
    let (native, source): (Value, Value) =
        (serde_json::from_str(&config(path(&at("native")))).unwrap(), serde_json::from_str(&config(FIXTURE)).unwrap());
    assert_eq!(native, source);
}

/// With biases everywhere and a separate head: uncompressed tensors come back byte for byte.
#[test]
fn biases_norms_and_heads_survive_every_format() {
    const PICO: &str = "fixtures/pico-llama";
    let folder = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(Path::new(PICO)).unwrap();
    for format in ["factored", "dense", "compressed-tensors", "peft", "gguf"] {
        for extra in [
            &[][..],
            &["--compensate", "lorc", "--compensate-rank", "4"],
            &["--targets", "*_proj", "--targets", "lm_head"],
        ] {
            let (out, dense) = (folder.path().join("out"), folder.path().join("dense"));
            let flags = ["--quant", "rtn-int8-channel", "--format", format, "--force", "-q"];
            ok(&[&["compress", PICO, "-o", path(&out)][..], &flags, extra].concat());
            ok(&["export", path(&out), "--format", "dense", "-o", path(&dense), "--force", "-q"]);
            let dense = Checkpoint::open(&dense).unwrap();
            assert_eq!(dense.tensors().count(), source.tensors().count(), "{format}");
            for info in source.tensors() {
                let bytes = |checkpoint: &Checkpoint| checkpoint.with_bytes(&info.name, <[u8]>::to_vec).unwrap();
                let with_head = extra.contains(&"lm_head") && info.name.starts_with("lm_head");
                let is_compressed = info.name.contains("_proj.weight") || with_head;
                assert!((bytes(&dense) == bytes(&source)) != is_compressed, "{format} {extra:?}: `{}`", info.name);
            }
        }
    }
}

#[test]
fn what_a_loader_would_misread_is_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--quant", "rtn-int4-asym-g32", "--format", "compressed-tensors"], 4, "asymmetric"),
        (&["--quant", "rtn-int3-g32", "--format", "compressed-tensors"], 4, "3 bits"),
        (&["--quant", "rtn-int2-g32", "--format", "gptq"], 4, "2 bits"),
        (&["--quant", "rtn-int4-g32-2of4", "--format", "compressed-tensors"], 4, "read dense codes"),
        (&["--quant", "rtn-int4-g32-2of4", "--format", "gguf"], 4, "no block type"),
        (&["--quant", "nf4", "--format", "gptq"], 4, "not nf4"),
        (&["--quant", "rtn-int4-g64", "--format", "compressed-tensors"], 4, "do not divide 96 inputs"),
        (&["--quant", "q4_0", "--format", "compressed-tensors"], 4, "not quantized in groups"),
        (
            &["--quant", "q4_0", "--format", "compressed-tensors"],
            4,
            "hint: `--format gguf` stores these blocks; codes for this format",
        ),
        (&["--quant", "q4_0", "--format", "compressed-tensors"], 4, "--quant rtn-int4-g32`"),
        (&["--quant", "q4_0"], 4, "block type of llama.cpp"),
        (&["--quant", "rtn-int4-g128", "--format", "gptq"], 4, "24 linears have 4 bits in one group per row"),
        (&["--quant", "nf4", "--format", "gguf"], 4, "no block type"),
        (&["--quant", "rtn-int4-asym", "--format", "gguf"], 4, "no block type"),
        (&["--quant", "rtn-int4-g16", "--format", "gguf"], 4, "not a multiple of blocks"),
        (&["--quant", "rtn-int4-g32,rtn-int8-g32", "--bits", "5", "--format", "gptq"], 2, "a single bit width"),
        (&["--keep", "0.8", "--format", "gguf"], 2, "cannot store low-rank factors without a quantized base"),
        (&["--quant", "rtn-int4", "--target-size", "1MB", "--format", "dense"], 2, "--target-size"),
        (&["--quant", "rtn-int4", "--compensate", "lorc"], 2, "--compensate-rank"),
        (&["--quant", "rtn-int4,rtn-int8"], 2, "needs a budget"),
        (&["--compensate", "lorc", "--keep", "0.8"], 2, "no effect without `--quant`"),
        (&["--quant", "rtn-int4", "--layout", "pivot"], 2, "--layout pivot"),
        (&["--quant", "rtn-int4", "--quant-factors", "int8"], 2, "no effect without `--compensate`"),
        (&["--quant", "gptq-int4"], 2, "needs `--calibration"),
        (&["--quant", "rtn-int2", "--bits", "1.5"], 2, "the minimum is"),
        (&["--bits", "3", "--keep", "0.5"], 2, "cannot be combined with"),
        (&["--quant", "int5"], 2, "is not a quantizer"),
    ];
    for (flags, code, expected) in cases {
        let run = lrc(&[&["compress", FIXTURE, "-o", path(&out)], *flags].concat());
        assert!(run.code == *code && run.stderr.contains(expected), "{flags:?}: {} {}", run.code, run.stderr);
        assert!(!out.exists() && !folder.path().join("out.partial").exists(), "{flags:?}");
    }
    // K-quants and grids have blocks of 256; only the down projections of the fixture are that wide, and the rest takes a
    // smaller block.
    for (name, smaller, most) in [("q4_k", "q5_0", 0.1), ("iq3_s", "iq4_nl", 0.25), ("iq2_xxs", "iq4_nl", 0.5)] {
        let report = compress(&out, &["--quant", name, "--format", "gguf", "--force"]);
        let [source, read] = [Path::new(FIXTURE), &out].map(|folder| lrc::model::open(folder).unwrap());
        for linear in report["linears"].as_array().unwrap() {
            let module = linear["module"].as_str().unwrap();
            let is_wide = module.ends_with("down_proj");
            assert_eq!(linear["quant"], if is_wide { name } else { smaller });
            let reason = format!("in {smaller}, because {name} does not divide 96 inputs");
            assert_eq!(linear["note"], if is_wide { Value::Null } else { reason.into() });
            let [values, found] = [&source, &read].map(|model| model.values(&format!("{module}.weight")).unwrap());
            let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
            let error =
                square(&mut values.iter().zip(&found).map(|(v, f)| v - f)) / square(&mut values.iter().copied());
            assert!(error.sqrt() < most, "{name} {module}: {}", error.sqrt());
        }
    }
}
