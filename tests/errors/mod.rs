//! Bad input: one clear error that names the file and the tensor, the documented exit code, and nothing lost.

mod compressed;
mod configs;
mod files;
mod runs;

use std::path::PathBuf;

use crate::common::{FIXTURE, HELD_OUT, copy, lrc, ok, path};

/// A copy of the fixture that a test may break.
struct Broken {
    folder: tempfile::TempDir,
}

impl Broken {
    fn new() -> Self {
        let broken = Self { folder: tempfile::tempdir().unwrap() };
        copy(FIXTURE, &broken.model());
        broken
    }

    fn sharded() -> Self {
        let broken = Self { folder: tempfile::tempdir().unwrap() };
        let model = broken.model();
        ok(&["compress", FIXTURE, "-o", path(&model), "-q", "--keep", "1.0", "--max-shard-size", "600kB"]);
        assert!(model.join("model.safetensors.index.json").exists());
        broken
    }

    fn model(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    fn weights(&self) -> PathBuf {
        self.model().join("model.safetensors")
    }

    fn edit_config(&self, from: &str, to: &str) {
        let path = self.model().join("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(path, text.replace(from, to)).unwrap();
    }

    /// Changes the bytes of the weight file.
    fn edit_weights(&self, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.weights()).unwrap();
        edit(&mut bytes);
        std::fs::write(self.weights(), bytes).unwrap();
    }

    /// Changes the header text of the weight file, keeping its length.
    fn edit_header(&self, from: &str, to: &str) {
        assert_eq!(from.len(), to.len());
        self.edit_weights(|bytes| {
            let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect("the header has it");
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        });
    }

    /// Runs all three commands; each must fail with `code`, name `parts` in its error, and write nothing.
    #[track_caller]
    fn check(&self, code: i32, parts: &[&str]) {
        let (model, out) = (self.model(), self.folder.path().join("out"));
        let commands: [&[&str]; 3] = [
            &["eval", path(&model), "--text", HELD_OUT, "--max-windows", "1"],
            &["compress", path(&model), "-o", path(&out), "--keep", "0.8"],
            &["inspect", path(&model)],
        ];
        for args in commands {
            self.check_one(args, code, parts);
        }
    }

    #[track_caller]
    fn check_one(&self, args: &[&str], code: i32, parts: &[&str]) {
        let run = lrc(args);
        assert_eq!(run.code, code, "lrc {args:?}: {}", run.stderr);
        assert_eq!(run.stderr.matches("error: ").count(), 1, "{}", run.stderr);
        for part in parts {
            assert!(run.stderr.contains(part), "`{part}` is not in: {}", run.stderr);
        }
        let left: Vec<_> = std::fs::read_dir(self.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["model"], "something was left behind");
    }
}
