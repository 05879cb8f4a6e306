//! Plain text tables.

/// Which side of its column a cell sticks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Columns as wide as their widest cell, two spaces apart.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub(crate) fn new(columns: &[(&str, Align)]) -> Self {
        let columns = columns
            .iter()
            .map(|(name, align)| ((*name).to_owned(), *align))
            .collect();
        Self {
            columns,
            rows: Vec::new(),
        }
    }

    /// Adds a row; missing cells are empty.
    pub(crate) fn row<I>(&mut self, cells: I)
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// The table as text for a terminal, each line ended.
    pub(crate) fn render(&self) -> String {
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|c| {
                let cells = self.rows.iter().filter_map(|row| row.get(c));
                cells
                    .chain([&self.columns[c].0])
                    .map(|s| s.chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let heading: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let mut text = self.line(&heading, &widths);
        let rule = widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1);
        text.push_str(&"─".repeat(rule));
        text.push('\n');
        for row in &self.rows {
            text.push_str(&self.line(row, &widths));
        }
        text
    }

    /// The table in Markdown.
    pub(crate) fn markdown(&self) -> String {
        let join = |cells: Vec<&str>| format!("| {} |\n", cells.join(" | "));
        let mut text = join(self.columns.iter().map(|(name, _)| name.as_str()).collect());
        let rule = |(_, align): &(String, Align)| match align {
            Align::Left => "---",
            Align::Right => "---:",
        };
        text.push_str(&join(self.columns.iter().map(rule).collect()));
        for row in &self.rows {
            text.push_str(&join(row.iter().map(String::as_str).collect()));
        }
        text
    }

    fn line(&self, cells: &[String], widths: &[usize]) -> String {
        let mut text = String::new();
        for (c, (_, align)) in self.columns.iter().enumerate() {
            let cell = cells.get(c).map_or("", String::as_str);
            let pad = " ".repeat(widths[c] - cell.chars().count());
            let gap = if c == 0 { "" } else { "  " };
            match align {
                Align::Left => text.push_str(&format!("{gap}{cell}{pad}")),
                Align::Right => text.push_str(&format!("{gap}{pad}{cell}")),
            }
        }
        format!("{}\n", text.trim_end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_right_and_names_left() {
        let mut table = Table::new(&[("name", Align::Left), ("n", Align::Right)]);
        table.row(["a", "1"]);
        table.row(["longer", "1000"]);
        assert_eq!(
            table.render(),
            "name       n\n────────────\na          1\nlonger  1000\n"
        );
        assert_eq!(
            table.markdown(),
            "| name | n |\n| --- | ---: |\n| a | 1 |\n| longer | 1000 |\n"
        );
    }
}
