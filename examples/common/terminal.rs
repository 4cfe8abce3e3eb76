//! The terminal: bars of progress, faint notes, and Ctrl-C.

use std::io;
use std::process::exit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use console::{style, Term};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike, WeakProgressBar};

/// The bar that is drawn, if one is.
static BAR: Mutex<Option<WeakProgressBar>> = Mutex::new(None);

/// Whether the next Ctrl-C is for an [`Answer`].
static CAUGHT: AtomicBool = AtomicBool::new(false);

/// A bar of so many steps, which moves on by itself where a step takes long.
pub fn bar(steps: usize, template: &str) -> Result<ProgressBar> {
    let bar = ProgressBar::new(steps as u64).with_style(ProgressStyle::with_template(template)?);
    Ok(drawn(bar, Duration::from_millis(500)))
}

/// What turns while there is no telling how long something takes.
pub fn spinner(message: &'static str) -> ProgressBar {
    drawn(ProgressBar::new_spinner().with_message(message), Duration::from_millis(100))
}

fn drawn(bar: ProgressBar, tick: Duration) -> ProgressBar {
    // The usual target knows whether there is a terminal that can draw.
    if !bar.is_hidden() {
        bar.set_draw_target(ProgressDrawTarget::term_like(Box::new(Narrower(Term::buffered_stderr()))));
    }
    *BAR.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.downgrade());
    bar.enable_steady_tick(tick);
    bar
}

/// Has Ctrl-C take the bar away before it ends the program, as a shell expects of it: with exit code 130.
pub fn tidy_on_ctrl_c() -> Result<()> {
    let end = || {
        if CAUGHT.swap(false, Ordering::SeqCst) {
            return;
        }
        // Held to the end, so that no other bar is drawn.
        let bar = BAR.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bar) = bar.as_ref().and_then(WeakProgressBar::upgrade) {
            bar.finish_and_clear();
        }
        exit(130);
    };
    ctrlc::set_handler(end).context("cannot handle Ctrl-C")
}

/// While it lives the first Ctrl-C does not end the program, but is known to [`is_stopped`](Self::is_stopped).
pub struct Answer(());

impl Answer {
    pub fn begin() -> Self {
        CAUGHT.store(true, Ordering::SeqCst);
        Self(())
    }

    pub fn is_stopped(&self) -> bool {
        !CAUGHT.load(Ordering::SeqCst)
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        CAUGHT.store(false, Ordering::SeqCst);
    }
}

/// A terminal with room for a `^C` behind what is drawn: behind the last column it would be in the next line, and the bar
/// would not be where it is taken away.
#[derive(Debug)]
struct Narrower(Term);

impl TermLike for Narrower {
    fn width(&self) -> u16 {
        TermLike::width(&self.0).saturating_sub("^C".len() as u16)
    }

    fn height(&self) -> u16 {
        TermLike::height(&self.0)
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_up(n)
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_down(n)
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_right(n)
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_left(n)
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.0.write_line(text)
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.0.write_str(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.0.clear_line()
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
}

/// To standard error, faint where that is a terminal with colours.
pub fn note(text: &str) {
    eprintln!("{}", style(text).for_stderr().dim());
}
