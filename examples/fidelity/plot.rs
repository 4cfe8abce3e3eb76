//! Error and KL against the budget, a line a method.

use std::path::Path;

use anyhow::{ensure, Result};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::report::{MethodReport, Report, Run};

/// Told apart by people of any colour vision (Okabe and Ito), then darker ones.
const COLORS: [RGBColor; 12] = [
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(100, 100, 100),
    RGBColor(148, 61, 0),
    RGBColor(120, 94, 240),
    RGBColor(0, 90, 60),
    RGBColor(160, 160, 160),
    RGBColor(0, 0, 0),
];

const FONT: &str = "sans-serif";
const PANEL: i32 = 430;
const SIZE: (u32, u32) = (1280, 460);

/// A figure of a run, if it was measured.
type Figure = fn(&Run) -> Option<f64>;

/// Writes the plot as SVG.
pub fn draw(report: &Report, file: &Path) -> Result<()> {
    let error: Figure = |run| run.layer_mean(|layer| layer.error);
    let kl: Figure = |run| run.model.map(|model| model.kl);
    let panels = [("error of the attention output", error), ("KL(dense ‖ method), nats", kl)];
    let measured =
        |figure: Figure| report.methods.iter().flat_map(|method| &method.runs).any(|run| figure(run).is_some());
    let panels: Vec<_> = panels.into_iter().filter(|(_, figure)| measured(*figure)).collect();
    let lines = report.methods.iter().any(|method| method.runs.iter().any(|run| run.share.is_some()));
    ensure!(lines && !panels.is_empty(), "--plot: expected a method that has a budget; such are all but edges");

    // The legend lists lines from top to bottom, as they end.
    let last = panels[panels.len() - 1].1;
    let end = |method: &MethodReport| method.runs.last().and_then(last).unwrap_or(0.);
    let mut methods: Vec<(&MethodReport, RGBColor)> = report.methods.iter().zip(COLORS.into_iter().cycle()).collect();
    methods.sort_by(|a, b| end(b.0).total_cmp(&end(a.0)));

    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut rest = root.clone();
        for (title, figure) in &panels {
            let (area, right) = rest.split_horizontally(PANEL);
            panel(&area, title, *figure, &methods)?;
            rest = right;
        }
        legend(&rest, &methods)?;
        root.present()?;
    }
    std::fs::write(file, svg).map_err(|error| anyhow::anyhow!("cannot write {}: {error}", file.display()))
}

fn panel(
    area: &DrawingArea<SVGBackend, Shift>,
    title: &str,
    figure: Figure,
    methods: &[(&MethodReport, RGBColor)],
) -> Result<()> {
    let points = |method: &MethodReport| -> Vec<(f64, f64)> {
        // A log axis has no 0: attention to everything is off the plot.
        let point = |run: &Run| Some((100. * run.share?, figure(run)?)).filter(|(_, y)| *y > 0.);
        method.runs.iter().filter_map(point).collect()
    };
    let all: Vec<_> = methods.iter().flat_map(|(method, _)| points(method)).collect();
    let flat = |method: &MethodReport| method.runs.iter().find(|run| run.share.is_none()).and_then(figure);
    let heights = all.iter().map(|(_, y)| *y).chain(methods.iter().filter_map(|(method, _)| flat(method)));
    let mut budgets: Vec<f64> = all.iter().map(|(x, _)| *x).collect();
    budgets.sort_by(f64::total_cmp);
    budgets.dedup_by(|a, b| (*a - *b).abs() < 1e-9);
    ensure!(!budgets.is_empty(), "--plot: expected a figure above 0");
    let (x, y) = (range(budgets.iter().copied(), 1.15), range(heights, 1.3));

    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 21))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(58)
        .build_cartesian_2d(
            (x.0..x.1).log_scale().with_key_points(budgets),
            (y.0..y.1).log_scale().with_key_points(ticks(y)),
        )?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .x_desc("keys chosen, % of all")
        .x_label_formatter(&|x| format!("{:.3}", x).trim_end_matches('0').trim_end_matches('.').to_string())
        .y_label_formatter(&|y| y.to_string())
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 17))
        .draw()?;
    for (method, color) in methods {
        let style = color.stroke_width(2);
        if let Some(y) = flat(method) {
            chart.draw_series(LineSeries::new([(x.0, y), (x.1, y)], color.stroke_width(1)))?;
        }
        let points = points(method);
        chart.draw_series(LineSeries::new(points.iter().copied(), style))?;
        chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, color.filled())))?;
    }
    Ok(())
}

fn legend(area: &DrawingArea<SVGBackend, Shift>, methods: &[(&MethodReport, RGBColor)]) -> Result<()> {
    for (index, (method, color)) in methods.iter().enumerate() {
        let y = 52 + 28 * index as i32;
        area.draw(&PathElement::new([(8, y), (34, y)], color.stroke_width(3)))?;
        let bytes = match method.bytes_per_key {
            None => "reads the keys".to_string(),
            Some(1.) => "1 byte a key".to_string(),
            Some(bytes) => format!("{bytes} bytes a key"),
        };
        let text = format!("{} ({bytes})", method.label);
        area.draw(&Text::new(text, (42, y - 8), (FONT, 16)))?;
    }
    Ok(())
}

/// From the smallest to the largest, and `margin` times more.
fn range(values: impl Iterator<Item = f64>, margin: f64) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, 0f64), |(low, high), value| (low.min(value), high.max(value)));
    (low / margin, high * margin)
}

/// 1, 2 and 5 times the powers of ten within.
fn ticks((low, high): (f64, f64)) -> Vec<f64> {
    let exponents = low.log10().floor() as i32..=high.log10().ceil() as i32;
    // Parsed, since 5 * 10^-4 would not be the number nearest to 0.0005.
    let ticks = exponents.flat_map(|exponent| ["1", "2", "5"].map(|digit| format!("{digit}e{exponent}").parse()));
    ticks.filter_map(Result::ok).filter(|tick| (low..=high).contains(tick)).collect()
}
