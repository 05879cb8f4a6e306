//! Graphs: the work of a step captured once and launched as a whole.

use std::fmt;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;

use super::device::Context;
use super::stream::Stream;
use crate::Result;

/// Captured work, ready to be launched any number of times.
pub struct Graph {
    exec: sys::CUgraphExec,
    nodes: usize,
    /// Keeps the kernels loaded.
    context: Arc<Context>,
}

// SAFETY: the driver lets any thread use a graph, one at a time: hence no `Sync`.
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ordinal = self.context.ordinal();
        write!(f, "Graph({} nodes on {ordinal})", self.nodes)
    }
}

/// A capture that has begun and must end, whatever happens in between.
struct Capture<'a> {
    stream: &'a Stream,
    open: bool,
}

/// A graph that has been captured.
struct Template<'a> {
    handle: sys::CUgraph,
    stream: &'a Stream,
}

impl<'a> Capture<'a> {
    fn begin(stream: &'a Stream) -> Result<Self> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        unsafe {
            let api = stream.context.bind()?;
            api.stream_begin_capture(stream.handle(), mode)
        }?;
        Ok(Self { stream, open: true })
    }

    fn end(&mut self) -> Result<Template<'a>> {
        self.open = false;
        let mut handle = null_mut();
        let api = self.stream.context.bind()?;
        // SAFETY: the pointer is to a local; the capture was begun on this stream.
        let ended = unsafe { api.stream_end_capture(self.stream.handle(), &mut handle) };
        let template = Template {
            handle,
            stream: self.stream,
        };
        ended.map(|()| template)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if self.open {
            // The error that led here is the one to report.
            drop(self.end());
        }
    }
}

impl Drop for Template<'_> {
    fn drop(&mut self) {
        if self.handle.is_null() {
            return;
        }
        if let Ok(api) = self.stream.context.bind() {
            // SAFETY: the handle came from the end of a capture; executable graphs do not need it.
            let _ = unsafe { api.graph_destroy(self.handle) };
        }
    }
}

impl Stream {
    /// Captures what `record` queues on this stream instead of running it. Kernels have to be
    /// loaded before ([`super::Device::ready`] does that); waiting and synchronous copies fail in
    /// here.
    ///
    /// # Errors
    /// What `record` returns; what the driver reports.
    pub fn capture(&self, record: impl FnOnce(&Self) -> Result<()>) -> Result<Graph> {
        let mut capture = Capture::begin(self)?;
        record(self)?;
        let template = capture.end()?;
        let api = self.context.bind()?;
        let mut nodes = 0;
        // SAFETY: a null array asks for the number only.
        unsafe { api.graph_get_nodes(template.handle, null_mut(), &mut nodes) }?;
        let mut exec = null_mut();
        // SAFETY: the pointer is to a local, the graph lives.
        unsafe { api.graph_instantiate(&mut exec, template.handle, 0) }
            .map_err(|e| self.context.explain(e, || graph_of(nodes)))?;
        Ok(Graph {
            exec,
            nodes,
            context: self.context.clone(),
        })
    }
}

/// For errors.
fn graph_of(nodes: usize) -> String {
    format!("a graph of {nodes} launches")
}

impl Graph {
    /// Number of kernels, copies and fills in it.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    /// Brings the graph to the GPU ahead of its first launch.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn upload(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both live.
        unsafe {
            let api = self.context.bind()?;
            api.graph_upload(self.exec, stream.handle())
        }
        .map_err(|e| self.context.explain(e, || graph_of(self.nodes)))
    }

    /// Queues all of it.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both live; what the kernels use was promised to `Device::ready`.
        unsafe {
            let api = self.context.bind()?;
            api.graph_launch(self.exec, stream.handle())
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Ok(api) = self.context.bind() {
            // SAFETY: made by `capture`; the driver lets a running launch finish.
            let _ = unsafe { api.graph_exec_destroy(self.exec) };
        }
    }
}
