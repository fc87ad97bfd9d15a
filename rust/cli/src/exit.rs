//! The exit statuses: part of the program's interface.

/// How a run ended; of several files the worst decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// 0: every file applies whole (or nothing was asked of a file, or the
    /// reader closed the pipe).
    Applies,
    /// 1: some file has no key of the name that is to be explained.
    NoSuchKey,
    /// 1: of some file only a part applies.
    Partial,
    /// 2: some file is rejected: nothing of it applies.
    Rejected,
    /// 3: some file or folder is unreadable or malformed.
    Unreadable,
    /// 64: the arguments make no sense; nothing was read.
    Usage,
    /// 74: the report could not be written, as on a full disk.
    Unwritable,
}

impl Exit {
    /// The status that the process ends with.
    pub fn code(self) -> u8 {
        match self {
            Self::Applies => 0,
            Self::NoSuchKey | Self::Partial => 1,
            Self::Rejected => 2,
            Self::Unreadable => 3,
            // The last two are EX_USAGE and EX_IOERR of sysexits.h.
            Self::Usage => 64,
            Self::Unwritable => 74,
        }
    }
}
