//! Text for people, as it was agreed on: helps, errors and tables. `TRYCMD=overwrite cargo test --release --test
//! suite golden` writes the current output.

#[test]
fn the_commands_say_what_was_agreed() {
    trycmd::TestCases::new().case("tests/golden/*.trycmd").env("NO_COLOR", "1").env("RAYON_NUM_THREADS", "2");
}
