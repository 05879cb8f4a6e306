//! The clock of `strftime_now`.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

/// A calendar time without zone, as templates print it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalTime {
    /// Years of the common era.
    pub year: i32,
    /// 1 to 12.
    pub month: u32,
    /// 1 to 31.
    pub day: u32,
    /// 0 to 23.
    pub hour: u32,
    /// 0 to 59.
    pub minute: u32,
    /// 0 to 59.
    pub second: u32,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

const DAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

impl LocalTime {
    /// The system clock in UTC; the standard library knows no time zones.
    pub fn utc_now() -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self::from_unix(since.as_secs() as i64)
    }

    /// The calendar time of seconds since 1970 in UTC.
    pub fn from_unix(seconds: i64) -> Self {
        let (days, rest) = (
            seconds.div_euclid(86_400),
            seconds.rem_euclid(86_400) as u32,
        );
        // Civil-from-days over 400-year eras that start in March, so leap days come last.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let of_era = shifted.rem_euclid(146_097);
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * of_year + 2) / 153;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        Self {
            year: (year_of_era + era * 400 + i64::from(month <= 2)) as i32,
            month: month as u32,
            day: (of_year - (153 * shifted_month + 2) / 5 + 1) as u32,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }

    /// Days since Monday.
    fn weekday(&self) -> usize {
        let shift = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let year = self.year - i32::from(self.month < 3);
        let sum = year + year.div_euclid(4) - year.div_euclid(100)
            + year.div_euclid(400)
            + shift[self.month_index()]
            + self.day as i32;
        (sum + 6).rem_euclid(7) as usize
    }

    fn month_index(&self) -> usize {
        (self.month.clamp(1, 12) - 1) as usize
    }

    fn day_of_year(&self) -> u32 {
        let leap = self.year % 4 == 0 && (self.year % 100 != 0 || self.year % 400 == 0);
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        before[self.month_index()] + self.day + u32::from(leap && self.month > 2)
    }

    /// Formats as C's `strftime` in the C locale.
    pub(super) fn strftime(&self, format: &str) -> Result<String, Error> {
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            match chars.next() {
                Some('-') => {
                    let field = chars.next().unwrap_or(' ');
                    let text = self.field(field)?;
                    let short = text.trim_start_matches(['0', ' ']);
                    out.push_str(if short.is_empty() { "0" } else { short });
                }
                Some(field) => out.push_str(&self.field(field)?),
                None => out.push('%'),
            }
        }
        Ok(out)
    }

    fn field(&self, field: char) -> Result<String, Error> {
        let hour12 = (self.hour + 11) % 12 + 1;
        Ok(match field {
            'Y' => self.year.to_string(),
            'y' => format!("{:02}", self.year.rem_euclid(100)),
            'C' => format!("{:02}", self.year.div_euclid(100)),
            'm' => format!("{:02}", self.month),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'H' => format!("{:02}", self.hour),
            'I' => format!("{hour12:02}"),
            'M' => format!("{:02}", self.minute),
            'S' => format!("{:02}", self.second),
            'f' => "000000".to_owned(),
            'p' => (if self.hour < 12 { "AM" } else { "PM" }).to_owned(),
            'B' => MONTHS[self.month_index()].to_owned(),
            'b' | 'h' => MONTHS[self.month_index()][..3].to_owned(),
            'A' => DAYS[self.weekday()].to_owned(),
            'a' => DAYS[self.weekday()][..3].to_owned(),
            'j' => format!("{:03}", self.day_of_year()),
            'u' => (self.weekday() + 1).to_string(),
            'w' => ((self.weekday() + 1) % 7).to_string(),
            'F' => self.strftime("%Y-%m-%d")?,
            'T' => self.strftime("%H:%M:%S")?,
            'R' => self.strftime("%H:%M")?,
            'D' | 'x' => self.strftime("%m/%d/%y")?,
            'X' => self.strftime("%H:%M:%S")?,
            'c' => self.strftime("%a %b %e %H:%M:%S %Y")?,
            // The time carries no zone, for which Python prints nothing.
            'z' | 'Z' => String::new(),
            'n' => "\n".to_owned(),
            't' => "\t".to_owned(),
            '%' => "%".to_owned(),
            other => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now does not know %{other}"),
                ));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::LocalTime;

    #[test]
    fn calendar_is_right() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 Thu 001"),
            (951_782_400, "2000-02-29 00:00:00 Tue 060"),
            (1_772_600_767, "2026-03-04 05:06:07 Wed 063"),
            (4_107_542_399, "2100-02-28 23:59:59 Sun 059"),
            (-1, "1969-12-31 23:59:59 Wed 365"),
        ] {
            let time = LocalTime::from_unix(seconds);
            assert_eq!(time.strftime("%F %T %a %j").unwrap(), text);
        }
    }

    #[test]
    fn fields_follow_python() {
        let time = LocalTime::from_unix(1_772_600_767);
        // datetime(2026, 3, 4, 5, 6, 7).strftime(...) in Python 3.12.
        for (format, text) in [
            ("%d %b %Y", "04 Mar 2026"),
            ("%B %-d, %Y", "March 4, 2026"),
            ("%A %I:%M %p", "Wednesday 05:06 AM"),
            ("%e|%y|%C|%u|%w|%%|%Z|%", " 4|26|20|3|3|%||%"),
            ("%c", "Wed Mar  4 05:06:07 2026"),
        ] {
            assert_eq!(time.strftime(format).unwrap(), text, "{format}");
        }
        assert!(time.strftime("%Q").unwrap_err().to_string().contains("%Q"));
    }
}
