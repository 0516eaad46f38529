// A screenshot and a task in, the model's next action out, with what the app holds beside it.

import PhotosUI
import SwiftUI
import UIKit

@main
struct AutoGLMPhoneApp: App {
    var body: some Scene {
        WindowGroup { TaskView() }
    }
}

struct TaskView: View {
    @Environment(\.scenePhase) private var phase
    @StateObject private var worker = Worker()
    @State private var task = "Open Settings"
    @State private var picked: PhotosPickerItem?

    var body: some View {
        Form {
            TextField("Task", text: $task)
            PhotosPicker("Screenshot", selection: $picked, matching: .screenshots)
            if worker.isBusy {
                Button("Stop", role: .cancel) { worker.stop() }
            } else {
                Button("Next action") { worker.start(task, picked) }.disabled(task.isEmpty)
            }
            Section("Answer") { Text(worker.answer).textSelection(.enabled) }
            Section("Memory") { Text(worker.memory).monospacedDigit() }
        }
        // iOS takes the GPU away from an app that leaves the screen.
        .onChange(of: phase) { if $0 == .background { worker.stop() } }
    }
}

@MainActor
final class Worker: ObservableObject {
    @Published private(set) var answer = ""
    @Published private(set) var memory = ""
    @Published private(set) var isBusy = false
    private var model: PhoneModel?
    private var work: Task<Void, Never>?

    func stop() { work?.cancel() }

    func start(_ task: String, _ picked: PhotosPickerItem?) {
        (answer, isBusy) = ("", true)
        work = Task {
            do {
                try await run(task, picked)
            } catch is CancellationError {
            } catch {
                let hint = (error as? ModelError)?.recoverySuggestion
                answer = [error.localizedDescription, hint].compactMap { $0 }.joined(separator: "\n")
                model = nil  // after a failed batch the GPU context stays broken
            }
            isBusy = false
        }
    }

    private func run(_ task: String, _ picked: PhotosPickerItem?) async throws {
        var screenshot: RGBImage?
        if let data = try await picked?.loadTransferable(type: Data.self) {
            guard let image = UIImage(data: data)?.cgImage else { throw CocoaError(.fileReadCorruptFile) }
            screenshot = try await Task.detached { try RGBImage(image) }.value
        }
        let loaded = try await loadModel()
        let messages = [
            Message(role: .system, text: systemPrompt(for: task)),
            Message(role: .user, text: task, image: screenshot),
        ]
        for try await text in loaded.answer(messages) {
            answer += text
            memory = Footprint.now()?.description ?? ""
        }
    }

    private func loadModel() async throws -> PhoneModel {
        if let model { return model }
        let folder = URL.documentsDirectory
        let files = try FileManager.default.contentsOfDirectory(at: folder, includingPropertiesForKeys: nil)
            .filter { $0.pathExtension == "gguf" }
        let mmproj = files.first { $0.lastPathComponent.hasPrefix("mmproj-") }
        guard let text = files.first(where: { $0 != mmproj }) else {
            throw ModelError(
                "no .gguf file in the app's documents",
                hint: "copy the pair there: Finder, the phone's Files tab, this app")
        }
        let loaded = try await Task.detached { try PhoneModel(text: text, mmproj: mmproj) }.value
        model = loaded
        return loaded
    }
}
