//! Linears that a format cannot hold: all are named, with the flags that leave them out.

use crate::common::{FIXTURE, lrc, ok, path};

use super::refused;

#[test]
fn all_linears_that_a_format_cannot_hold_are_named_with_the_flags_that_leave_them_out() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let args =
        ["compress", FIXTURE, "-o", path(&out), "--quant", "rtn-int4-g64", "--format", "compressed-tensors", "-q"];
    let run = lrc(&args);
    refused(
        &run,
        4,
        &[
            "24 linears cannot be stored",
            "groups of 64 do not divide 96 inputs",
            "and 21 more",
            "end the quantizer in `-g32`",
            "--exclude '",
        ],
    );
    // The suggested flags work.
    let hint = run.stderr.split("`lrc compress` with `").nth(1).unwrap().split('`').next().unwrap();
    let flags: Vec<&str> = hint.split(' ').map(|word| word.trim_matches('\'')).collect();
    ok(&[&args[..], &flags].concat());
    assert!(out.exists());
}

/// Groups longer than some rows become those rows, and a GPTQ checkpoint has groups of one size.
#[test]
fn all_linears_whose_groups_differ_are_named_with_the_flags_that_leave_them_out() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let args = ["compress", FIXTURE, "-o", path(&out), "--quant", "rtn-int4", "--format", "gptq", "-q"];
    let run = lrc(&args);
    refused(
        &run,
        4,
        &[
            "24 linears have 4 bits in one group per row",
            "`model.layers.2.mlp.down_proj` and 1 more have 4 bits in groups of 128",
            "--exclude 'model.layers.*.mlp.down_proj'",
        ],
    );
    let hint = run.stderr.split("`lrc compress` with `").nth(1).unwrap().split('`').next().unwrap();
    let flags: Vec<&str> = hint.split(' ').map(|word| word.trim_matches('\'')).collect();
    ok(&[&args[..], &flags].concat());
}
