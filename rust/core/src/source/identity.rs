//! Who a file is: enough to notice that it was changed or that another one took its path.

use std::fs::File;
use std::io;

/// Size, time of the last change, and the file's number on its volume, taken from an open handle.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    size_bytes: u64,
    mtime_ns: i128,
    volume: u64,
    file_id: u64,
}

impl FileIdentity {
    /// Asks the system about an open file.
    #[cfg(unix)]
    pub fn of(file: &File) -> io::Result<Self> {
        use std::os::unix::fs::MetadataExt;

        const NS_PER_SECOND: i128 = 1_000_000_000;
        let metadata = file.metadata()?;
        Ok(Self {
            size_bytes: metadata.size(),
            // |i64| · 10^9 + |i64| is far below 2^127.
            mtime_ns: i128::from(metadata.mtime()) * NS_PER_SECOND
                + i128::from(metadata.mtime_nsec()),
            volume: metadata.dev(),
            file_id: metadata.ino(),
        })
    }

    /// Asks the system about an open file.
    #[cfg(windows)]
    pub fn of(file: &File) -> io::Result<Self> {
        // A FILETIME counts 100 ns from 1601 on; this is 1970 in that count.
        const UNIX_EPOCH: i128 = 116_444_736_000_000_000;
        const NS_PER_TICK: i128 = 100;
        let information = winapi_util::file::information(file)?;
        // Some network drives have no times: always 1601, so always equal.
        let ticks = i128::from(information.last_write_time().unwrap_or(0));
        Ok(Self {
            size_bytes: information.file_size(),
            mtime_ns: (ticks - UNIX_EPOCH) * NS_PER_TICK,
            volume: information.volume_serial_number(),
            file_id: information.file_index(),
        })
    }

    /// Length of the file.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// When the content last changed: nanoseconds since 1970, UTC.
    pub fn mtime_ns(&self) -> i128 {
        self.mtime_ns
    }

    /// The volume's number: `st_dev`, or the serial number on Windows.
    pub fn volume(&self) -> u64 {
        self.volume
    }

    /// The file's number on its volume: `st_ino`, or the file index on Windows.
    pub fn file_id(&self) -> u64 {
        self.file_id
    }

    /// The differences from an earlier identity, for a message.
    pub(super) fn changes_since(&self, then: &Self) -> String {
        let mut changes = Vec::new();
        if self.size_bytes != then.size_bytes {
            changes.push(format!(
                "size from {} to {} bytes",
                then.size_bytes, self.size_bytes
            ));
        }
        if self.mtime_ns != then.mtime_ns {
            changes.push(format!(
                "time from {} to {} ns",
                then.mtime_ns, self.mtime_ns
            ));
        }
        if self.volume != then.volume {
            changes.push(format!("volume from {} to {}", then.volume, self.volume));
        }
        if self.file_id != then.file_id {
            changes.push(format!("file id from {} to {}", then.file_id, self.file_id));
        }
        changes.join(", ")
    }
}
