//! A progress bar on stderr, where that is a terminal, and nothing elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use premap::{Progress, Stages};

use crate::strategy::Strategy;

/// Shows how far one strategy is; gone without a trace when dropped.
pub(crate) struct Bar {
    bar: ProgressBar,
    stages: Option<Stages>,
}

impl Bar {
    /// Makes a bar for a strategy on so many bytes. indicatif draws to stderr, and only if that is a terminal.
    pub(crate) fn new(strategy: Strategy, bytes: u64) -> Self {
        let stages = strategy.stages();
        let bar = ProgressBar::new(if stages == Some(Stages::Both) { 2 * bytes } else { bytes });
        let style = ProgressStyle::with_template("{prefix:11} {bar:40} {percent:>3} %  {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(strategy.name());
        Self { bar, stages }
    }

    /// The engine is at work.
    pub(crate) fn mapping(&self, progress: &Progress) {
        self.bar.set_message("mapping memory");
        self.bar.set_position(match self.stages {
            Some(Stages::Both) => progress.host + progress.second,
            Some(Stages::Second) => progress.second,
            _ => progress.host,
        });
    }

    /// The guest is at work. Nothing is drawn while it runs, so that nothing disturbs it.
    pub(crate) fn running(&self) {
        self.bar.set_message("the guest runs");
        self.bar.tick();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
