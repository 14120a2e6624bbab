//! Fuzzes one target, or all in turn, for a given number of seconds:
//!
//! ```sh
//! cargo run --release --example fuzz -- all 60 [SEED]
//! cargo run --release --example fuzz -- outputs 600 7
//! cargo run --release --example fuzz -- config --input FILE
//! ```
//!
//! Inputs run in a second process under `ulimit -v`, so that aborts and endless loops are detected too. A failing
//! input is written to `fuzz-TARGET-SEED-NUMBER` in the current folder; moved to `tests/corpus/TARGET/`, it is run by
//! `tests/hostile/` from then on.

#![allow(clippy::disallowed_methods, clippy::print_stdout, clippy::unwrap_used)]

#[path = "../tests/fuzz/mod.rs"]
mod fuzz;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use fuzz::{Bench, SLOW, TARGETS, Target};

/// Address space of the process that runs inputs, in KiB.
const LIMIT_KIB: u64 = 4 << 20;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let find = |name: &str| TARGETS.iter().find(|target| target.name == name);
    match args.as_slice() {
        ["--worker", name, seed, first] => worker(find(name).unwrap(), seed.parse().unwrap(), first.parse().unwrap()),
        [name, "--input", file] => {
            let input = std::fs::read(file).unwrap();
            let outcome = Bench::new(find(name).unwrap()).run(&input);
            let fault = outcome.fault();
            println!("{}", fault.as_deref().unwrap_or("fine"));
            return if fault.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        [name, seconds, rest @ ..] => {
            let chosen: Vec<&'static Target> = TARGETS.iter().filter(|t| *name == "all" || t.name == *name).collect();
            if chosen.is_empty() {
                println!("no target `{name}`");
                return ExitCode::FAILURE;
            }
            let seconds = Duration::from_secs(seconds.parse().unwrap());
            let seed = rest.first().map_or(0, |seed| seed.parse().unwrap());
            let n_found: usize = chosen.into_iter().map(|target| supervise(target, seconds, seed)).sum();
            return if n_found == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        _ => println!("usage: fuzz TARGET|all SECONDS [SEED], or fuzz TARGET --input FILE"),
    }
    ExitCode::SUCCESS
}

/// Runs inputs from `first` on until it is stopped; prints the number of each input, and each finding.
fn worker(target: &'static Target, seed: u64, first: u64) {
    std::panic::set_hook(Box::new(|_| {}));
    let bench = Bench::new(target);
    let mut stdout = std::io::stdout().lock();
    for number in first.. {
        let input = bench.input(seed, number);
        writeln!(stdout, "{number}").unwrap();
        if let Some(fault) = bench.run(&input).fault() {
            writeln!(stdout, "{number} {fault}").unwrap();
        }
    }
}

/// Lets workers run for a time; returns the number of inputs that failed.
fn supervise(target: &'static Target, time: Duration, seed: u64) -> usize {
    let started = Instant::now();
    let (mut n_found, mut next) = (0, 0u64);
    let mut known: Vec<String> = Vec::new();
    while started.elapsed() < time {
        let script = format!("ulimit -v {LIMIT_KIB}; exec \"$0\" --worker {} {seed} {next}", target.name);
        let program = std::env::current_exe().unwrap();
        let mut child = Command::new("bash")
            .args(["-c", &script, program.to_str().unwrap()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let (mut ended, mut is_ready) = (None, false);
        while started.elapsed() < time {
            // The files of a target take a while to be made.
            let patience = if is_ready { 2 * SLOW } else { 30 * SLOW };
            match lines.recv_timeout(patience) {
                Ok(line) => match line.split_once(' ') {
                    None => (is_ready, next) = (true, line.parse::<u64>().unwrap() + 1),
                    Some((number, what)) => {
                        n_found += usize::from(report(target, seed, number.parse().unwrap(), what, &mut known));
                    }
                },
                Err(RecvTimeoutError::Timeout) => ended = Some("never ends"),
                Err(RecvTimeoutError::Disconnected) => ended = Some("ends the process"),
            }
            if ended.is_some() {
                break;
            }
        }
        let _ = child.kill();
        let status = child.wait().unwrap();
        if let Some(what) = ended {
            n_found +=
                usize::from(report(target, seed, next.saturating_sub(1), &format!("{what} ({status})"), &mut known));
        }
    }
    println!("{}: {next} inputs in {:.0} s, {n_found} faults", target.name, started.elapsed().as_secs_f64());
    n_found
}

/// Saves an input, unless one with the same message exists already.
fn report(target: &'static Target, seed: u64, number: u64, what: &str, known: &mut Vec<String>) -> bool {
    let words: String = what.chars().filter(|c| !c.is_ascii_digit()).collect();
    if known.contains(&words) {
        return false;
    }
    known.push(words);
    let path = format!("fuzz-{}-{seed}-{number}", target.name);
    std::fs::write(&path, Bench::new(target).input(seed, number)).unwrap();
    println!("{}: `{path}` {what}", target.name);
    true
}
