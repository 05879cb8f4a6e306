//! What images are compiled for, and where they run.

use std::fmt;

/// Compute capability 99.9: names have one digit for the minor version.
const MAX_NUMBER: u32 = 999;

/// What an image was compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Architecture {
    /// Machine code for a compute capability and later minors of its major.
    Machine((u32, u32)),
    /// Machine code with what only this compute capability has (`sm_90a`).
    MachineAlone((u32, u32)),
    /// PTX, for this compute capability and all later ones.
    Ptx((u32, u32)),
}

impl Architecture {
    /// Reads `sm_80`, `sm_90a` or `compute_80`.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let capability = |digits: &str| {
            let plain = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
            let n: u32 = plain.then(|| digits.parse().ok())??;
            (10..=MAX_NUMBER).contains(&n).then_some((n / 10, n % 10))
        };
        if let Some(digits) = name.strip_prefix("compute_") {
            return Some(Self::Ptx(capability(digits)?));
        }
        let rest = name.strip_prefix("sm_")?;
        Some(match rest.strip_suffix('a') {
            Some(digits) => Self::MachineAlone(capability(digits)?),
            None => Self::Machine(capability(rest)?),
        })
    }

    /// To sort by: machine code first, by compute capability.
    pub(super) fn order(self) -> (bool, u32, u32) {
        match self {
            Self::Machine((major, minor)) | Self::MachineAlone((major, minor)) => {
                (false, major, minor)
            }
            Self::Ptx((major, minor)) => (true, major, minor),
        }
    }

    /// How names of its images end.
    pub(super) fn extension(self) -> &'static str {
        match self {
            Self::Machine(_) | Self::MachineAlone(_) => ".cubin",
            Self::Ptx(_) => ".ptx",
        }
    }

    /// How well it suits a GPU, the more the better; `None` when it does not run there.
    pub(super) fn rank(self, capability: (u32, u32)) -> Option<(u32, (u32, u32))> {
        match self {
            Self::MachineAlone(own) => (own == capability).then_some((3, own)),
            Self::Machine(own) => {
                (own.0 == capability.0 && own.1 <= capability.1).then_some((2, own))
            }
            Self::Ptx(own) => (own <= capability).then_some((1, own)),
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine((major, minor)) => write!(f, "sm_{major}{minor}"),
            Self::MachineAlone((major, minor)) => write!(f, "sm_{major}{minor}a"),
            Self::Ptx((major, minor)) => write!(f, "compute_{major}{minor}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for name in [
            "sm_80",
            "sm_90a",
            "sm_100",
            "sm_120",
            "compute_80",
            "compute_120",
        ] {
            assert_eq!(Architecture::parse(name).unwrap().to_string(), name);
        }
        for name in [
            "",
            "sm_",
            "sm_a",
            "sm_9",
            "sm_090",
            "sm_+90",
            "sm_90b",
            "sm_9000",
            "compute_90a",
            "sm_99999999999",
            "gfx_90",
        ] {
            assert_eq!(Architecture::parse(name), None, "{name}");
        }
    }
}
