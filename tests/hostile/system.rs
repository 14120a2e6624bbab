//! Streams that cannot be written, and limits of the system.

use crate::common::{FIXTURE, HELD_OUT, ok, path};

use super::{refused, under};

#[test]
#[cfg(target_os = "linux")]
fn streams_that_cannot_be_written_change_no_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for (args, code) in [
        (&["inspect", FIXTURE, "-vv", "--csv"][..], 0),
        (&["inspect", "no-such-folder"], 4),
        (&["inspect", "no-such-folder", "--log-format", "json"], 4),
        (&["compress", FIXTURE, "-o", path(&out), "--keep", "2"], 2),
        (&["eval", FIXTURE, "--text", HELD_OUT, "--max-windows", "1", "-v"], 0),
        (&["inspect", FIXTURE, "--fail-if", "parameters > 1"], 3),
        (&["inspect", FIXTURE, "--no-such-flag"], 2),
    ] {
        for shell in ["LRC 2>&-", "LRC 2>/dev/full"] {
            assert_eq!(under(shell, args).code, code, "{shell} {args:?}");
        }
    }
    // Lost data is an error; a reader that closes the pipe is not, and hides no gate.
    let full = under("LRC >/dev/full", &["inspect", FIXTURE, "--csv"]);
    refused(&full, 6, &["error: cannot write to stdout: No space left on device"]);
    assert_eq!(under("LRC >/dev/full 2>/dev/full", &["inspect", FIXTURE, "--csv"]).code, 6);
    assert_eq!(under("LRC >&-", &["inspect", FIXTURE, "--csv"]).code, 0);
    let gated = ["inspect", FIXTURE, "--csv", "--fail-if", "parameters > 1"];
    for (args, code) in [(&gated[..3], 0), (&gated[..], 3)] {
        let run = under("set -o pipefail; { LRC; echo \"code $?\" >&2; } | true", args);
        assert!(run.stderr.contains(&format!("code {code}")), "{}", run.stderr);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn limits_of_the_system_are_exit_code_6() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let compress = ["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "-q"];
    refused(
        &under("ulimit -f 500; LRC", &compress),
        6,
        &["model.safetensors", "File too large", "hint: raise the limit", "ulimit -f", "run the same command again"],
    );
    ok(&compress);
    // With a limit between nothing and enough, an allocation fails, and the standard library reports its size.
    let (mut n_aborted, mut n_told) = (0, 0);
    for kib in (40_000..400_000).step_by(20_000) {
        let run = under(&format!("ulimit -v {kib}; LRC"), &["inspect", FIXTURE, "--csv"]);
        // The dynamic linker may be the first to fail.
        assert!([0, 6, 127].contains(&run.code), "{kib}: {} {}", run.code, run.stderr);
        n_aborted += usize::from(run.code == 6);
        let is_told = run.stderr.contains("memory allocation of");
        assert!(
            !is_told || run.stderr.contains("error: out of memory") && run.stderr.contains("hint: "),
            "{}",
            run.stderr
        );
        n_told += usize::from(is_told);
    }
    assert!(n_aborted > 0 && n_told > 0, "{n_aborted} {n_told}");
}
