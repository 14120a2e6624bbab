//! What card, page and report say of widths and of the time of a forward pass.

use crate::common::{FIXTURE, TRAIN, ok, path};

use super::{report, widths};

#[test]
fn card_and_page_have_the_widths_of_every_block_and_the_report_the_forward_pass() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let own = ["compress", FIXTURE, "-o", path(&out), "--calibration", TRAIN, "--samples", "8", "--keep", "0.6"];
    let shown = ok(&[&own[..], &["--structure", "narrow", "--uniform-width=false", "--width-multiple", "8"]].concat());
    let found = report(&out);
    let [card, page] = ["README.md", "lrc-report.html"].map(|file| std::fs::read_to_string(out.join(file)).unwrap());
    let channels = widths(&found, "channels");
    let by_block: Vec<String> = channels.iter().enumerate().map(|(at, [_, after])| format!("{at}: {after}")).collect();
    assert!(channels.windows(2).any(|pair| pair[0] != pair[1]));
    assert!(card.contains(&format!("channels by block of the source: {}.", by_block.join(", "))), "{card}");
    for part in
        ["<h2>Widths</h2>", "share of channels and groups kept", "relative error of narrowing", "all parameters"]
    {
        assert!(page.contains(part), "{part}");
    }
    let rows = page.matches("<td data-v=\"channels\">").count();
    assert_eq!(rows, channels.len());
    // Times are in the report alone, so that pages and cards are the same bytes in every run.
    for time in ["forward_before", "forward_after"] {
        assert!(found["timings"][time].as_f64().is_some_and(|seconds| seconds > 0.0), "{}", found["timings"]);
        assert!(!page.contains(time) && !card.contains(time));
    }
    assert!(shown.stdout.contains("blocks run in "), "{}", shown.stdout);
    let (uniform, plain) = (folder.path().join("uniform"), folder.path().join("plain"));
    let run =
        |out, flags: &[&str]| ok(&[&["compress", FIXTURE, "-q", "-o", path(out), "--keep", "0.6"], flags].concat());
    run(&uniform, &["--structure", "narrow"]);
    let card = std::fs::read_to_string(uniform.join("README.md")).unwrap();
    assert!(card.contains("channels in each of 4 blocks: ") && !card.contains("by block of the source"), "{card}");
    run(&plain, &[]);
    assert!(report(&plain)["timings"].get("forward_before").is_none());
    assert!(!std::fs::read_to_string(plain.join("lrc-report.html")).unwrap().contains("<h2>Widths</h2>"));
}
