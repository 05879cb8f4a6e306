//! Pages of layers that see a window only.

use exl_kernels::ops::PAGE_TOKENS;

use super::KvShape;

/// Layers that see a window only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlidingLayers {
    /// How many there are.
    pub layers: usize,
    /// Tokens that they see, the row's own included: the most of any of them.
    pub window: usize,
}

/// Pages of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvPages {
    /// Pages that sequences name.
    pub all: usize,
    /// Pages of the sliding layers where these keep only what their windows need: then sequences name
    /// pages for them apart. Otherwise they have `all` pages of the same numbers.
    pub window: Option<usize>,
}

impl From<usize> for KvPages {
    /// So many pages of every layer.
    fn from(all: usize) -> Self {
        Self { all, window: None }
    }
}

impl KvPages {
    pub(super) fn of_sliding(&self) -> usize {
        self.window.unwrap_or(self.all)
    }

    pub(super) fn of_layer(&self, shape: &KvShape, layer: usize) -> usize {
        match layer < shape.full_layers() {
            true => self.all,
            false => self.of_sliding(),
        }
    }
}

impl KvShape {
    /// Layers that see everything.
    pub fn full_layers(&self) -> usize {
        self.layers.saturating_sub(self.sliding.layers)
    }

    /// `pages` pages of which sliding layers keep what they need for `seqs` sequences in steps of up to
    /// `rows` tokens ([`least_window_pages`]), and as much again as the windows take, for texts that
    /// begin like others and for taking tokens back. Where that would be no less, all layers have the
    /// same pages.
    pub fn windowed(&self, pages: usize, (seqs, rows): (usize, usize)) -> KvPages {
        let window = self.sliding.window;
        let room = seqs.saturating_mul(most_pages(window.saturating_sub(1)));
        let needed = least_window_pages(window, (seqs, rows)).saturating_add(room);
        KvPages {
            all: pages,
            window: Some(needed).filter(|&needed| self.sliding.layers > 0 && needed < pages),
        }
    }
}

/// Most pages that so many tokens in a row lie in, wherever they begin.
fn most_pages(tokens: usize) -> usize {
    match tokens {
        0 => 0,
        tokens => tokens.saturating_add(PAGE_TOKENS - 2) / PAGE_TOKENS + 1,
    }
}

/// Window pages with which `seqs` sequences always go on in steps of `rows` tokens in all: the pages that
/// the window before a sequence's next token and its tokens of the step lie in, and two more for a page
/// that is copied.
pub fn least_window_pages(window: usize, (seqs, rows): (usize, usize)) -> usize {
    // The sum of `most_pages(window - 1 + rows)` over sequences that share the rows, rounded once.
    let tokens = seqs.saturating_mul(window.saturating_add(PAGE_TOKENS - 3));
    (tokens.saturating_add(rows) / PAGE_TOKENS)
        .saturating_add(seqs)
        .saturating_add(2)
}

#[cfg(test)]
mod tests {
    use exl_kernels::KvType;

    use super::super::KvBuffers;
    use super::*;

    fn shape(layers: usize, sliding: SlidingLayers) -> KvShape {
        KvShape {
            layers,
            sliding,
            kv_heads: 2,
            head_dim: 32,
            kv: KvType::F16,
        }
    }

    /// The bound is that of all places where sequences can begin and all ways to share the rows.
    #[test]
    fn the_least_pages_hold_every_window_and_step() {
        let pages = |from: usize, to: usize| to.div_ceil(PAGE_TOKENS) - from / PAGE_TOKENS;
        for window in [1usize, 2, 8, 255, 256, 257, 258, 512, 1000] {
            let most = |rows: usize| {
                let start = |start: usize| (start + 1).saturating_sub(window);
                let all = (2000..2000 + PAGE_TOKENS).map(|s| pages(start(s), s + rows));
                all.max().unwrap()
            };
            for rows in [1usize, 2, 255, 256, 257, 511, 700] {
                assert_eq!(most(rows), most_pages(window - 1 + rows), "{window} {rows}");
                assert!(most(rows) + 2 <= least_window_pages(window, (1, rows)));
                for other in [0, 1, 300] {
                    let two = most(rows) + most(other).max(most(0));
                    assert!(two + 2 <= least_window_pages(window, (2, rows + other)));
                }
            }
        }
        assert!(least_window_pages(usize::MAX, (3, 5)) > usize::MAX / PAGE_TOKENS);
    }

    #[test]
    fn sliding_layers_keep_less_where_that_is_less() {
        let sliding = SlidingLayers {
            layers: 5,
            window: 1024,
        };
        let mixed = shape(6, sliding);
        let pages = mixed.windowed(128, (1, 513));
        // 7 and 2 of the least, 5 of windows.
        assert_eq!(pages.window, Some(6 + 1 + 2 + 5));
        let page = mixed.bytes(1) / 6;
        assert_eq!(mixed.bytes(pages), page * (128 + 5 * 14));
        assert_eq!(mixed.windowed(14, (1, 513)), 14.into());
        assert_eq!(
            shape(6, SlidingLayers::default()).windowed(128, (1, 513)),
            128.into()
        );
        let only = shape(5, sliding);
        assert_eq!(only.bytes(only.windowed(1000, (1, 513))), 5 * 14 * page);
    }

    #[test]
    fn pages_and_window_pages_are_copied_apart() {
        let sliding = SlidingLayers {
            layers: 2,
            window: 8,
        };
        let pages = KvPages {
            all: 4,
            window: Some(2),
        };
        let mut apart = KvBuffers::new(shape(3, sliding), pages).unwrap();
        let mut together = KvBuffers::new(shape(3, sliding), 4).unwrap();
        assert_eq!(apart.bytes(), shape(3, sliding).bytes(pages));
        assert_eq!(together.window_page_bytes(), 0);
        let (all, window) = (apart.page_bytes(), apart.window_page_bytes());
        assert_eq!((all + window, 2 * all), (together.page_bytes(), window));

        let content: Vec<u8> = (0..all + window).map(|i| (i * 7 + i / 251) as u8).collect();
        let (first, second) = content.split_at(all);
        apart.write_page(3, first).unwrap();
        apart.write_window_page(0, second).unwrap();
        apart.copy_page(3, 1).unwrap();
        apart.copy_window_page(0, 1).unwrap();
        // A cache of as many pages of every layer has the same content in the same order.
        together.write_page(2, &content).unwrap();
        together.copy_page(2, 0).unwrap();
        let mut read = vec![0; content.len()];
        together.read_page(0, &mut read).unwrap();
        assert_eq!(read, content);
        let (mut a, mut b) = (vec![0; all], vec![0; window]);
        apart.read_page(1, &mut a).unwrap();
        apart.read_window_page(1, &mut b).unwrap();
        assert_eq!([a, b].concat(), content);
    }
}
