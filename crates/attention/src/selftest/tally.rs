//! One case's verdict: the error that came nearest to what is allowed, or what went wrong.

/// One line of the table.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Row {
    /// `golden`, `property`, `bitwise` or `hostile`.
    pub suite: &'static str,
    /// What was computed, and by which way, such as `varlen · cpu bf16`.
    pub case: String,
    /// The error that came nearest to what it may be, and which one it was: empty for yes or no.
    pub worst: f64,
    /// What that error may be.
    pub allowed: f64,
    /// Whether everything held.
    pub pass: bool,
    /// The tensor with the worst error; what went wrong, when something did.
    pub note: String,
}

impl Row {
    /// The verdict of `check`.
    pub fn of(
        suite: &'static str,
        case: impl Into<String>,
        check: impl FnOnce(&mut Tally) -> Check<()>,
    ) -> Self {
        let mut tally = Tally::default();
        let result = check(&mut tally);
        let Tally { worst, allowed, name, broken } = tally;
        let pass = result.is_ok() && broken.is_empty();
        let note = match result {
            Err(Fault(text)) => text,
            Ok(()) if broken.is_empty() => name,
            Ok(()) => broken.join("; "),
        };
        Self { suite, case: case.into(), worst, allowed, pass, note }
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Self { suite, case, worst, allowed, note, .. } = self;
        let verdict = if self.pass { "pass" } else { "FAIL" };
        write!(f, "{verdict} {suite} {case}: {worst:.2e} of {allowed:.2e} {note}")
    }
}

/// Why a case could not be computed, or is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Fault(pub String);

/// Result of everything that may go wrong in a check.
pub type Check<T> = Result<T, Fault>;

impl From<tercet_cuda::Error> for Fault {
    fn from(error: tercet_cuda::Error) -> Self {
        Fault(error.to_string())
    }
}

impl From<crate::Error> for Fault {
    fn from(error: crate::Error) -> Self {
        Fault(error.to_string())
    }
}

/// A fault with this text unless `holds`.
pub fn ensure(holds: bool, text: impl FnOnce() -> String) -> Check<()> {
    if holds { Ok(()) } else { Err(Fault(text())) }
}

/// Gathers the errors of one case.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    worst: f64,
    allowed: f64,
    name: String,
    broken: Vec<String>,
}

impl Tally {
    /// Notes that `name` is off by `error` where `allowed` may be.
    pub fn hold(&mut self, name: &str, error: f64, allowed: f64) {
        // A NaN fails.
        if error <= allowed {
            // Compared by share of what is allowed; exact results need no room.
            if self.name.is_empty() || error * self.allowed > self.worst * allowed {
                (self.worst, self.allowed, self.name) = (error, allowed, name.to_owned());
            }
            return;
        }
        if self.broken.is_empty() {
            (self.worst, self.allowed, self.name) = (error, allowed, name.to_owned());
        }
        self.broken.push(format!("{name} is off by {error:.2e}, allowed {allowed:.2e}"));
    }
}
