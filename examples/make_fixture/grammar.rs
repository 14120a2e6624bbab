//! A small grammar of stories. Names, things and places come back later in a story, so that a model must look back to
//! predict them.

use std::collections::HashSet;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

const NAMES: &[&str] = &["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Iris", "Jon", "Kim", "Lena"];
const THINGS: &[&str] =
    &["kite", "lamp", "drum", "boat", "apple", "book", "clock", "rope", "bell", "coat", "shell", "map"];
const COLOURS: &[&str] = &["red", "green", "blue", "yellow", "white", "old", "small", "heavy", "shiny", "broken"];
const PLACES: &[&str] =
    &["river", "market", "hill", "garden", "bridge", "school", "harbour", "forest", "tower", "barn"];
const ANIMALS: &[(&str, &str)] =
    &[("fox", "foxes"), ("crow", "crows"), ("goat", "goats"), ("mouse", "mice"), ("hen", "hens"), ("horse", "horses")];
const MOODS: &[&str] = &["happy", "tired", "hungry", "proud", "afraid", "curious"];
const COUNTS: &[&str] = &["one", "two", "three", "four", "five", "six", "seven"];

struct Dice(ChaCha8Rng);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n as u64) as usize
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    /// Two different ones.
    fn pair<T: Copy + PartialEq>(&mut self, list: &[T]) -> (T, T) {
        let first = self.pick(list);
        loop {
            let second = self.pick(list);
            if second != first {
                return (first, second);
            }
        }
    }
}

fn story(dice: &mut Dice) -> String {
    let (hero, friend) = dice.pair(NAMES);
    let (thing, other) = dice.pair(THINGS);
    let (colour, tint) = dice.pair(COLOURS);
    let (place, goal) = dice.pair(PLACES);
    let mood = dice.pick(MOODS);
    let (animal, animals) = dice.pick(ANIMALS);
    let n = dice.below(4) + 1;
    let mut lines = vec![format!("{hero} had a {colour} {thing}, and {friend} had a {tint} {other}.")];
    let middle = [
        format!("They met at the {place} and walked to the {goal}."),
        format!("At the {place} they saw {} {}.", COUNTS[n], animals),
        format!("A {animal} took the {thing} and ran from the {place} to the {goal}."),
        format!("{hero} was {mood}, so {friend} sang a song about the {tint} {other}."),
        format!("{hero} gave the {thing} to {friend}. Now {friend} had the {thing} and the {other}."),
        format!("One more {animal} came, so there were {} {animals}.", COUNTS[n + 1]),
    ];
    let mut used = HashSet::new();
    for _ in 0..2 + dice.below(3) {
        let line = dice.below(middle.len());
        if used.insert(line) {
            lines.push(middle[line].clone());
        }
    }
    lines.push(match dice.below(4) {
        0 => format!("Who had the {colour} {thing} first? It was {hero}."),
        1 => format!("Who had the {tint} {other} first? It was {friend}."),
        2 => format!("What did {hero} bring? A {colour} {thing}. What did {friend} bring? A {tint} {other}."),
        _ => format!("In the evening {hero} went home, and {friend} stayed at the {goal}."),
    });
    lines.join(" ")
}

/// Stories of about `n_bytes` in total that are not in `known`, which gets them.
pub fn stories(seed: u64, n_bytes: usize, known: &mut HashSet<String>) -> String {
    let mut dice = Dice(ChaCha8Rng::seed_from_u64(seed));
    let mut text = String::new();
    while text.len() < n_bytes {
        let story = story(&mut dice);
        if known.insert(story.clone()) {
            text += &story;
            text += "\n";
        }
    }
    text
}
