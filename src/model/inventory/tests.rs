use super::*;
use crate::checkpoint::{SafetensorsWriter, TensorSpec};

/// A checkpoint of tensors, and of modules (5, 6) in some form, all zero.
fn checkpoint(
    config: &str,
    tensors: &[(&str, Dtype, &[usize])],
    modules: &[(&str, Form)],
) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let plain =
        |&(name, dtype, shape): &(&str, Dtype, &[usize])| TensorSpec { name: name.into(), dtype, shape: shape.into() };
    let mut specs: Vec<_> = tensors.iter().map(plain).collect();
    for (module, form) in modules {
        specs.extend(form.parts((5, 6)).into_iter().map(|Part { suffix, element, shape }| {
            let (dtype, n_dims) = if element == Element::Index { (Dtype::I32, 1) } else { (Dtype::F32, 2) };
            let name = format!("{module}.{}", part_name(suffix, element));
            TensorSpec { name, dtype, shape: shape[..n_dims].into() }
        }));
    }
    let mut writer = SafetensorsWriter::create(folder.path(), &specs, 1 << 20).unwrap();
    for spec in &specs {
        writer.write(&spec.name, &vec![0; spec.n_bytes() as usize]).unwrap();
    }
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    (folder, checkpoint)
}

#[test]
fn linears_are_told_from_tables_by_name_and_shape() {
    let [x, y] = [(Kind::FACTORS, 1), (Kind::default(), 2)].map(|(kind, rank)| Form::of_rank(kind, rank, (5, 6)));
    let (_folder, checkpoint) = checkpoint(
        r#"{"model_type": "unheard_of"}"#,
        &[
            ("encoder.layer.0.query.weight", Dtype::F16, &[4, 6]),
            ("encoder.layer.0.query.bias", Dtype::F16, &[4]),
            ("encoder.layer.0.LayerNorm.weight", Dtype::F16, &[6]),
            ("embeddings.word_embeddings.weight", Dtype::F16, &[9, 6]),
            ("moe.gate.weight", Dtype::F32, &[4, 6]),
            ("codes.weight", Dtype::I64, &[4, 6]),
            ("conv.weight", Dtype::F32, &[4, 6, 3, 3]),
            ("lm_head.weight", Dtype::F32, &[9, 6]),
            ("embed_out.weight", Dtype::F32, &[9, 6]),
            ("embeddings.position.output.weight", Dtype::F32, &[9, 6]),
            ("x.base.weight", Dtype::F32, &[5, 6]),
        ],
        &[("x", x), ("y", y)],
    );
    let found: Vec<_> = linears(&checkpoint).into_iter().map(|l| (l.module, l.is_default_target, l.stored)).collect();
    let of = |Form { kind, size, .. }, has_base| Stored::Structured { kind, size, has_base };
    let expected = [
        ("moe.gate", false, Stored::Dense),
        ("lm_head", false, Stored::Dense),
        ("embed_out", false, Stored::Dense),
        ("encoder.layer.0.query", true, Stored::Dense),
        ("x", true, of(x, true)),
        ("y", true, of(y, false)),
    ];
    let found: BTreeSet<String> = found.into_iter().map(|linear| format!("{linear:?}")).collect();
    assert_eq!(found, expected.iter().map(|linear| format!("{linear:?}")).collect());
}

#[test]
fn conv1d_is_transposed() {
    let (_folder, checkpoint) =
        checkpoint(r#"{"model_type": "gpt2"}"#, &[("h.0.attn.c_attn.weight", Dtype::F32, &[4, 12])], &[]);
    let linear = &linears(&checkpoint)[0];
    assert_eq!((linear.out_features, linear.in_features, linear.block), (12, 4, Some(0)));
    assert_eq!(weight(&checkpoint, linear).unwrap(), vec![0.0; 48]);
}
