//! Quantized checkpoints as sources: recognized, and refused where their codes are broken.

use crate::common::{FIXTURE, HELD_OUT, copy, lrc, ok, path};

use super::{LORC, MODULE, compress};

#[test]
fn quantized_sources_are_recognized() {
    let folder = tempfile::tempdir().unwrap();
    for (format, flags) in [("factored", LORC), ("compressed-tensors", &[]), ("gptq", &[]), ("gguf", &[])] {
        let out = folder.path().join(format);
        compress(&out, &[&["--quant", "rtn-int4-g32", "--format", format], flags].concat());
        let again = folder.path().join("again");
        let run = lrc(&["compress", path(&out), "-o", path(&again), "--keep", "0.8"]);
        assert!(run.code == 4 && run.stderr.contains("already"), "{format}: {}", run.stderr);
        assert!(!again.exists());
        // A dequantized model is a source like any other.
        let dense = folder.path().join(format!("{format}-dense"));
        ok(&["export", path(&out), "--format", "dense", "-o", path(&dense), "-q"]);
        ok(&["compress", path(&dense), "-o", path(&again), "--keep", "0.8", "-q"]);
        std::fs::remove_dir_all(&again).unwrap();
    }
    let run = lrc(&[
        "truncate",
        path(&folder.path().join("factored")),
        "-o",
        path(&folder.path().join("t")),
        "--keep",
        "0.5",
    ]);
    assert!(run.code == 2 && run.stderr.contains("of the bytes that is already kept"), "{}", run.stderr);
    // Layouts of other tools that lrc does not read.
    let model = folder.path().join("foreign");
    copy(FIXTURE, &model);
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    for (quantization, expected) in [
        (r#"{"quant_method": "aqlm"}"#, "aqlm"),
        (r#"{"quant_method": "awq", "bits": 4, "version": "gemv"}"#, "gemv"),
        (r#"{"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}"#, "nvfp4-pack-quantized"),
        (r#"{"quant_method": "gptq", "bits": 5}"#, "5 bits"),
    ] {
        let with = config.replacen('{', &format!("{{\"quantization_config\": {quantization},"), 1);
        std::fs::write(model.join("config.json"), with).unwrap();
        for command in [&["inspect"][..], &["eval", "--text", HELD_OUT]] {
            let run = lrc(&[&command[..1], &[path(&model)], &command[1..]].concat());
            assert!(run.code == 4 && run.stderr.contains(expected) && run.stderr.contains("hint"), "{}", run.stderr);
        }
    }
}

#[test]
fn broken_codes_are_an_error_that_names_them() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    compress(&out, &["--quant", "rtn-int4-g32"]);
    let config = out.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    for (from, to, expected) in [("int4-g32", "int3-g32", "codes"), ("int4-g32", "int9", "not a known scheme")] {
        std::fs::write(&config, text.replace(from, to)).unwrap();
        let run = lrc(&["inspect", path(&out)]);
        assert!(
            run.code == 4 && run.stderr.contains(expected) && run.stderr.contains("model.layers"),
            "{}",
            run.stderr
        );
    }
}

/// Tensors of other sizes than their codes need: an error, and no panic.
#[test]
fn codes_and_scales_that_do_not_fit_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    for (format, part) in [("compressed-tensors", "weight_scale"), ("gptq", "scales"), ("gptq", "qzeros")] {
        let out = folder.path().join(part);
        compress(&out, &["--quant", "rtn-int4-g32", "--format", format]);
        let file = out.join("model.safetensors");
        let bytes = std::fs::read(&file).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let name = format!("{MODULE}.{part}");
        // The same tensors, one of them a row short.
        let views: Vec<(String, safetensors::tensor::TensorView<'_>)> = tensors
            .tensors()
            .into_iter()
            .map(|(n, view)| {
                if n != name {
                    return (n, view);
                }
                let shape = vec![view.shape()[0] - 1, view.shape()[1]];
                let len = view.data().len() / view.shape()[0] * shape[0];
                let short = safetensors::tensor::TensorView::new(view.dtype(), shape, &view.data()[..len]).unwrap();
                (n, short)
            })
            .collect();
        std::fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
        let run = lrc(&["inspect", path(&out)]);
        assert!(
            run.code == 4 && run.stderr.contains("model.layers.1.mlp.down_proj"),
            "{format} {part}: {} {}",
            run.code,
            run.stderr
        );
    }
}
